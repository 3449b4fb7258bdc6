"""The shard that one of several processes keeps of a model, in a fake process group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from mtp_lightning.distributed.sharding import (
    build_mesh,
    is_sharded,
    local,
    outlined,
    own_part,
    shard,
    spread,
    whole,
)
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.mtp.nextlat import NextLatConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.init import sets_everything
from tests import deepseek

RANK, WORLD = 1, 3


@pytest.fixture
def group() -> Iterator[None]:
    """A group in which this process is the second of three, and the others send nothing."""
    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    yield
    dist.destroy_process_group()


def _sharded(config: ModelConfig, *, seed: int) -> MTPModel:
    with torch.device("meta"):
        model = MTPModel(config)
    assert sets_everything(model)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    shard(model, build_mesh("cpu", WORLD, None), blocks)
    model.to_empty(device="cpu")
    model.initialize(seed)
    return model


@pytest.mark.parametrize("mtp", [SequentialConfig, LinearConfig, NextLatConfig])
def test_a_process_draws_its_rows_of_the_unsharded_weights(group, tiny_trunk, mtp):
    config = ModelConfig(trunk=tiny_trunk, mtp=mtp(depth=2))
    plain = MTPModel(config)
    plain.initialize(5)
    sharded = _sharded(config, seed=5)
    expected = plain.state_dict()
    assert sharded.state_dict().keys() == expected.keys()
    for name, tensor in sharded.state_dict().items():
        size = -(-expected[name].shape[0] // WORLD)
        rows = expected[name].split(size)  # of one size, except for the last ones
        expected_rows = rows[RANK] if len(rows) > RANK else expected[name][:0]
        assert torch.equal(local(tensor), expected_rows), name


def test_a_process_keeps_a_third_of_the_weights(group: None, tiny_trunk: TrunkConfig) -> None:
    model = _sharded(ModelConfig(trunk=tiny_trunk, mtp=SequentialConfig(depth=2)), seed=0)
    kept = sum(local(p).numel() for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert total / WORLD * 0.9 < kept < total / WORLD * 1.1
    assert is_sharded(model) and not is_sharded(nn.Linear(1, 1))


def test_biases_of_experts_start_at_zero(group: None) -> None:
    trunk = deepseek.trunk()
    model = _sharded(ModelConfig(trunk=trunk, mtp=SequentialConfig(depth=1)), seed=0)
    buffers = dict(model.named_buffers())
    assert buffers and all(torch.equal(b, torch.zeros_like(b)) for b in buffers.values())


def test_a_buffer_that_initialize_does_not_set_is_found(tiny_trunk: TrunkConfig) -> None:
    model = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=SequentialConfig(depth=1)))
    model.register_buffer("table", torch.ones(3))
    assert not sets_everything(model)


def test_the_mesh_of_several_copies_has_two_dimensions(group: None) -> None:
    with pytest.raises(RuntimeError):
        build_mesh("cpu", 4, 2)  # more than the three processes
    mesh = build_mesh("cpu", WORLD, 1)
    assert mesh.mesh_dim_names == ("replicate", "shard") and mesh.shape == (WORLD, 1)


def test_a_state_is_outlined_and_spread(group: None) -> None:
    full = torch.arange(12.0).view(6, 2)
    like = own_part(full, _dtensor(full))
    assert torch.equal(local(like), full[2:4])
    outline = outlined({"a": full, "b": [full, 3], "c": "text"})
    assert outline["a"].is_meta and outline["b"][0].shape == full.shape and outline["b"][1] == 3
    assert torch.equal(local(spread(full, like)), full[2:4])
    plain = torch.zeros(2)
    assert whole(plain) is plain and local(plain) is plain and own_part(full, plain) is full


def _dtensor(tensor: torch.Tensor) -> torch.Tensor:
    layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
    shard(layer, build_mesh("cpu", WORLD, None), [])
    return layer.weight

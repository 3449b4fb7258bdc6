"""``mtp.init`` and ``init_from``: new modules on a trained trunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data_modules.windows import WindowBatch
from mtp_lightning.experiment.init_from import start_from
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.last_block import RIDGE, fit_projection
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.weights import StoredModel
from tests import deepseek
from tests.models import build, stored_of


def stored_start(trunk: TrunkConfig, mtp: MTPConfig | None = None) -> StoredModel:
    return stored_of(trunk, mtp or NoMTPConfig())


def text(depth: int, *, documents: bool = False) -> WindowBatch:
    generator = torch.Generator().manual_seed(2)
    shape = (12, 20 + depth + 1)
    tokens = torch.randint(0, 37, shape, generator=generator)
    ids = (torch.arange(shape[1]) // 7).expand(shape) if documents else None
    return WindowBatch(tokens, depth, ids)


def model_from(start: StoredModel, mtp: MTPConfig, batch: WindowBatch) -> MTPModel:
    model = MTPModel(ModelConfig(trunk=start.config.trunk, mtp=mtp))
    model.initialize(0)
    start_from(model, start, batch)
    return model.eval()


def solve_by_least_squares(x: np.ndarray, y: np.ndarray, hidden: slice) -> np.ndarray:
    """The projection by a least-squares solver, with further rows for the ridge."""
    root = 1 / np.sqrt((y**2).mean(axis=1, keepdims=True) * len(x))
    x, y = x * root, y * root
    h = x[:, hidden]
    prior = np.zeros((x.shape[1], y.shape[1]))
    prior[hidden] = np.eye(y.shape[1]) * (h * y).sum() / (h**2).sum()
    ridge = np.sqrt(RIDGE * (x**2).sum() / x.shape[1])
    rows = np.concatenate([x, ridge * np.eye(x.shape[1])])
    return np.linalg.lstsq(rows, np.concatenate([y, ridge * prior]), rcond=None)[0].T


@pytest.mark.parametrize(
    ("kind", "documents", "switches"),
    [
        ("dense", False, {"depth": 3}),
        ("dense", True, {"depth": 1, "concat": "hidden_first", "input_norm": "pre"}),
        ("deepseek", True, {"depth": 2, "branch": "before_last", "input_norm": "pre"}),
        ("dense", False, {"depth": 2, "branch": "before_last", "concat": "hidden_first",
                          "freeze_trunk": True}),
        ("deepseek", False, {"depth": 3, "share_layers": True}),
        ("dense", True, {"depth": 2, "token_dropout": 1.0}),
        ("deepseek", False, {"depth": 2, "blocks": 2}),
        ("dense", True, {"depth": 2, "blocks": 2, "share_layers": True}),
    ],
    ids=str,
)  # fmt: skip
def test_init_from_the_last_block_sets_every_weight_of_a_module(
    tiny_trunk: TrunkConfig, kind: str, switches: dict[str, Any], documents: bool
) -> None:
    start = stored_start(tiny_trunk if kind == "dense" else deepseek.TRUNK)
    mtp = SequentialConfig(init="last_block", **switches)
    batch = text(mtp.depth, documents=documents)
    model = model_from(start, mtp, batch)
    trunk = model.trunk
    for name, tensor in start.weights.items():
        assert torch.equal(model.state_dict()[name], tensor), name

    # The trunk reads windows that are longer by D tokens, which gives the states ahead.
    plain = build(start.config.trunk, NoMTPConfig(), seed=5)
    states: dict[str, torch.Tensor] = {}
    blocks = list(plain.trunk.blocks)
    for name, block in (("before", blocks[-1]), ("copied", blocks[-mtp.blocks])):
        block.register_forward_pre_hook(lambda _, args, name=name: states.update({name: args[0]}))
    blocks[-1].register_forward_hook(lambda _, __, out: states.update(last=out))
    with torch.no_grad():
        plain(WindowBatch(batch.tokens, 0, batch.documents))
    last = states["before" if mtp.branch == "before_last" else "last"]
    hidden = last if mtp.input_norm == "pre" else trunk.norm(last)
    hidden = hidden[:, : batch.seq_len]
    _, inputs = model.run_trunk(batch, [1])
    for k in range(1, mtp.depth + 1):
        module = model.mtp.depths[0 if mtp.share_layers else k - 1]
        token = model.trunk.embedding.weight[batch.tokens[:, k : batch.seq_len + k]]
        if mtp.token_dropout:
            token = model.mtp.blank.expand_as(token)
        if k == 1 or not mtp.share_layers:
            assert torch.equal(module.norm.weight, trunk.norm.weight)
            assert torch.equal(module.enorm.weight, torch.ones(32))
            assert torch.equal(module.hnorm.weight, torch.ones(32))
            for copy, block in zip(module.blocks, trunk.blocks[-mtp.blocks :], strict=True):
                for name, tensor in block.state_dict().items():
                    assert torch.equal(copy.state_dict()[name], tensor), name
            halves = [_rms(token), _rms(hidden)]
            if mtp.concat == "hidden_first":
                halves.reverse()
            x, y = torch.cat(halves, -1), states["copied"][:, k : batch.seq_len + k]
            valid = torch.ones(x.shape[:2], dtype=torch.bool)
            if batch.documents is not None:
                valid = batch.documents[:, : batch.seq_len] == batch.shifted(batch.documents, k - 1)
            half = slice(0, 32) if mtp.concat == "hidden_first" else slice(32, 64)
            x, y = (t[valid].double().numpy() for t in (x, y))
            expected = solve_by_least_squares(x, y, half)
            np.testing.assert_allclose(
                module.eh_proj.weight.detach().numpy(), expected, rtol=1e-3, atol=2e-4
            )
        with torch.no_grad():
            hidden = module(hidden, token, inputs.ctx)


def _rms(x: torch.Tensor) -> torch.Tensor:
    return (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).detach()


@pytest.mark.parametrize("n", [3, 60])
def test_the_projection_equals_that_of_a_solver(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 12))
    y = rng.normal(size=(n, 6)) * np.exp(rng.normal(size=(n, 1)) * 3)  # outliers
    projection = fit_projection(torch.from_numpy(x), torch.from_numpy(y), slice(6, 12)).numpy()
    expected = solve_by_least_squares(x, y, slice(6, 12))
    np.testing.assert_allclose(projection, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("trunk", ["dense", "deepseek"])
def test_parallel_heads_from_the_last_block_start_as_the_main_prediction(
    tiny_trunk: TrunkConfig, trunk: str
) -> None:
    start = stored_start(tiny_trunk if trunk == "dense" else deepseek.TRUNK)
    batch = text(3)
    model = model_from(start, ParallelConfig(depth=3, init="last_block"), batch)
    states = model(batch)
    assert all(torch.equal(states[0], states[k]) for k in (1, 2, 3))
    drawn = model_from(start, ParallelConfig(depth=3), batch)
    assert not torch.equal(drawn(batch)[1], states[1])


@pytest.mark.parametrize(("config", "tied"), [(SequentialConfig, True), (ParallelConfig, False)])
def test_random_modules_start_with_the_trunks_norm(
    tiny_trunk: TrunkConfig, config: type[MTPConfig], tied: bool
) -> None:
    """With gains of 1, a head that was trained with other gains could give huge logits."""
    start = stored_start(replace(tiny_trunk, tie_embeddings=tied))
    model = MTPModel(ModelConfig(trunk=start.config.trunk, mtp=config(depth=2)))
    model.initialize(0)
    drawn = {name: tensor.clone() for name, tensor in model.mtp.state_dict().items()}
    start_from(model, start)
    for name, tensor in model.mtp.state_dict().items():
        norm = name in ("depths.0.norm.weight", "depths.1.norm.weight")
        assert torch.equal(tensor, start.weights["trunk.norm.weight"] if norm else drawn[name])


def test_a_module_of_the_checkpoint_is_kept(tiny_trunk: TrunkConfig) -> None:
    start = stored_start(tiny_trunk, SequentialConfig(depth=1))
    model = model_from(start, SequentialConfig(depth=3, init="last_block"), text(3))
    for name, tensor in start.weights.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    last = model.trunk.blocks[-1].state_dict()
    for module in list(model.mtp.depths)[1:]:
        assert isinstance(module, nn.Module)
        assert torch.equal(
            module.block.state_dict()["attention.out.weight"], last["attention.out.weight"]
        )


def test_init_from_the_last_block_is_refused_where_it_does_not_fit(tiny_trunk: TrunkConfig) -> None:
    last = SequentialConfig(depth=1, init="last_block")
    with pytest.raises(
        ValueError, match=r"mtp.init=last_block has no effect: init_from=old.ckpt holds every"
    ):
        model_from(stored_start(tiny_trunk, SequentialConfig(depth=1)), last, text(1))
    experts = deepseek.TRUNK.feed_forward
    assert isinstance(experts, ExpertsConfig)
    dense = deepseek.trunk(experts={"first_k_dense": 3})
    for mtp in (last, ParallelConfig(depth=1, init="last_block")):
        with pytest.raises(ValueError, match=r"last_block does not fit, .*Missing key"):
            model_from(stored_start(dense), mtp, text(1))
    one_token_each = replace(text(1), documents=torch.arange(22).expand(12, 22))
    with pytest.raises(ValueError, match="no text to fit: with data.document_mask=true"):
        model_from(stored_start(tiny_trunk), last, one_token_each)
    with pytest.raises(ValueError, match=r"no meaning for parallel heads with mtp.input_norm=post"):
        ParallelConfig(depth=1, init="last_block", input_norm="post")
    with pytest.raises(ValueError, match=r"mtp.init=warm"):
        SequentialConfig(depth=1, init="warm")  # type: ignore[arg-type]

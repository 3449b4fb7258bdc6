"""Parallel, linear and parameter-free heads against references written from the papers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from tests.losses import mtp_loss
from tests.models import build, windows

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("variant", ["parallel", "linear", "parameter_free"])
def test_weight_zero_is_plain_training_bit_for_bit(tiny_trunk: TrunkConfig, variant: str) -> None:
    mtp = MTPConfig.find(variant)(depth=2)
    batch = windows(2, 9, 2)
    totals, grads = [], []
    for config, rows in ((mtp, batch), (NoMTPConfig(), WindowBatch(batch.tokens[:, :-2], 0))):
        model = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=config))
        model.initialise(3)
        total, _ = mtp_loss(model, rows, [0.0] * config.depth, [18] * (config.depth + 1))
        total.backward()
        totals.append(total)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*totals)
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[1])


def test_medusas_heads_start_as_the_main_prediction(tiny_trunk: TrunkConfig) -> None:
    model = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=LinearConfig(depth=2)))
    model.initialise(0)
    hidden = model(windows(1, 8, 2))
    assert torch.equal(hidden[1], hidden[0]) and torch.equal(hidden[2], hidden[0])
    mtp_loss(model, windows(1, 8, 2), [0.3, 0.3], [8] * 3)[0].backward()
    # At zero a head still learns: SiLU's slope there is a half.
    assert all(p.grad.abs().max() > 1e-4 for p in model.mtp.parameters())


@pytest.mark.parametrize("variant", ["parallel", "linear"])
def test_a_depth_that_is_not_active_is_not_computed(tiny_trunk: TrunkConfig, variant: str) -> None:
    model = build(tiny_trunk, MTPConfig.find(variant)(depth=3))
    calls: list[int] = []
    for index, module in enumerate(model.mtp.depths):
        module.register_forward_hook(lambda *_, index=index: calls.append(index + 1))
    batch = windows(1, 8, 3)
    for active in ([], [2], [1, 3]):
        calls.clear()
        assert list(model(batch, active)) == [0, *active]
        assert calls == active, "independent heads need no other"
    mtp_loss(model, batch, [0.0, 0.1, 0.0], [8] * 4)[0].backward()
    trained = {k for k in (1, 2, 3) if model.mtp.parameters_of(k)[0].grad is not None}
    assert trained == {2}


@pytest.mark.parametrize("variant", ["parallel", "linear", "sequential"])
def test_before_last_leaves_the_last_block_to_the_main_prediction(
    tiny_trunk: TrunkConfig, variant: str
) -> None:
    def last_block_gradient(branch: str) -> Tensor:
        model = build(tiny_trunk, MTPConfig.find(variant)(depth=1, branch=branch))
        grads = []
        for weight in (1.0, 0.0):
            mtp_loss(model, windows(2, 8, 1), [weight], [16, 16])[0].backward()
            grads.append(model.trunk.blocks[-1].attention.qkv.weight.grad.clone())
            model.zero_grad()
        return grads[0] - grads[1]

    assert last_block_gradient("before_last").abs().max() < 1e-7
    assert last_block_gradient("final").abs().max() > 1e-5


@pytest.mark.parametrize("variant", ["parallel", "linear"])
def test_detach_cuts_where_it_says(tiny_trunk: TrunkConfig, variant: str) -> None:
    trunk = replace(tiny_trunk, tie_embeddings=False)
    for detach, trunk_cut, head_cut in (
        ("none", False, False),
        ("trunk", True, False),
        ("all", True, True),
    ):
        model = build(trunk, MTPConfig.find(variant)(depth=2, detach=detach))
        grads = []
        for weight in (1.0, 0.0):
            mtp_loss(model, windows(2, 8, 2), [weight] * 2, [16] * 3)[0].backward()
            first, head = model.trunk.blocks[0].attention.qkv.weight.grad, model.head.weight.grad
            grads.append((first.clone(), head.clone()))
            if weight:
                assert all(p.grad.abs().max() > 1e-6 for p in model.mtp.parameters())
            model.zero_grad()
        for cut, a, b in zip((trunk_cut, head_cut), *grads, strict=True):
            assert bool((a - b).abs().max() < 1e-7) == cut, detach


# Variants of one depth, or of none.
FIXED_DEPTH = ("none", "teacherless", "top", "bag", "registers")


def test_who_drafts(tiny_trunk: TrunkConfig) -> None:
    for name, kind in MTPConfig.variants().items():
        mtp = kind() if name in FIXED_DEPTH else kind(depth=2)
        stack = mtp.build(tiny_trunk)
        assert (stack.max_draft_depth != 0) == (name not in (*FIXED_DEPTH, "parameter_free"))
        if stack.max_draft_depth != 0:
            stack.require_drafts()
        else:
            with pytest.raises(ValueError, match=f"parameter_free|no MTP depth|mtp={name} shapes"):
                stack.require_drafts()


@pytest.mark.parametrize(
    ("build_bad", "message"),
    [
        (lambda: ParallelConfig(depth=1, branch="top"), "mtp.branch=top is unknown"),
        (lambda: LinearConfig(depth=1, detach="head"), "mtp.detach=head is unknown"),
        (lambda: LinearConfig(depth=-1), "at least 0, not -1"),
        (lambda: ParallelConfig(depth=0, freeze_trunk=True), "leaves nothing to train"),
        (lambda: SequentialConfig(depth=1, hidden_state_mixing=True), "nothing to mix"),
    ],
)
def test_bad_switches_are_named(build_bad: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_bad()


@pytest.mark.parametrize("variant", sorted(MTPConfig.variants()))
def test_configs_compose_to_the_variants_defaults_and_round_trip(
    tiny_trunk: TrunkConfig, variant: str
) -> None:
    from mtp_lightning.experiment.instantiate import instantiate

    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", overrides=[f"mtp={variant}"])
    counted = {"weights": "idf"} if variant == "bag" else {}  # null: by the data
    mtp = instantiate(cfg.mtp, **counted)
    kind = MTPConfig.find(variant)
    assert mtp == (kind() if variant in FIXED_DEPTH else kind(depth=2)), "YAML and class disagree"
    config = ModelConfig(trunk=tiny_trunk, mtp=mtp)
    assert config.mtp.variant == variant
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_who_reads_true_tokens(tiny_trunk: TrunkConfig) -> None:
    kinds = {"sequential": True, "parallel": False, "linear": False, "parameter_free": False}
    for variant, reads in kinds.items():
        assert build(tiny_trunk, MTPConfig.find(variant)(depth=2)).mtp.reads_tokens is reads
    assert not build(tiny_trunk, SequentialConfig(depth=0)).mtp.reads_tokens

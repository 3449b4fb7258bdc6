"""All heads: the tokens that a depth reads, the initialization, the modules that run.

``tests/objective/test_cross_product.py`` compares states, losses and gradients with the
definitions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from data_modules.windows import WindowBatch
from mtp_lightning.experiment.instantiate import instantiate
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.linear import LinearMTP
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.nn.config import TrunkConfig
from tests.losses import gradients, mtp_loss
from tests.models import build, windows

CONF = Path(__file__).parents[2] / "conf"
MARKOV: dict[str, Any] = {"correction": "markov", "correction_rank": 5}
SELECTOR: dict[str, Any] = {"correction": "selector", "correction_rank": 5}
PLAIN = ("sequential", "parallel", "linear", "parameter_free", "joint", "nextlat", "eagle")
HEADS: dict[str, Callable[..., MTPConfig]] = {
    **{name: MTPConfig.find(name) for name in PLAIN},
    "linear mlp": partial(MTPConfig.find("linear"), correction="mlp"),
    "parallel markov": partial(MTPConfig.find("parallel"), **MARKOV),
    "linear selector": partial(MTPConfig.find("linear"), **SELECTOR),
    "masked": partial(MTPConfig.find("masked"), lora_rank=4),
    "dflash": partial(MTPConfig.find("dflash"), blocks=2),
    "dflash markov": partial(MTPConfig.find("dflash"), **MARKOV),
}
# Heads whose states depend on no token ahead, or only on the last one.
READS_NONE = ("parallel", "linear", "parameter_free", "linear selector")
READS_LAST = ("parallel markov", "masked")
# Variants whose depth is 0 or 1.
FIXED_DEPTH = ("none", "teacherless", "top", "bag", "registers")
every_head = pytest.mark.parametrize("head", HEADS)


@every_head
def test_a_depth_reads_the_true_tokens_up_to_its_own_and_no_further(
    tiny_trunk: TrunkConfig, head: str
) -> None:
    """A change of the token ``ahead`` of ``at`` changes depth k there only if k reads that far."""
    model, batch, at = build(tiny_trunk, HEADS[head](depth=3)).double(), windows(2, 6, 3), 2
    before = model(batch)
    for ahead in (1, 2, 3, 4):
        tokens = batch.tokens.clone()
        tokens[0, at + ahead] = (tokens[0, at + ahead] + 1) % 37
        after = model(WindowBatch(tokens, 3))
        for k in range(4):
            unread = head in READS_NONE or ahead > k or (head in READS_LAST and ahead < k)
            unread |= head == "dflash" and ahead > 1
            unread |= head == "dflash markov" and 1 < ahead < k
            assert torch.equal(before[k][0, at], after[k][0, at]) == unread
            assert torch.equal(before[k][1], after[k][1])


# The matrices that start at zero, so that a new head gives the main prediction.
ZERO: dict[str, Callable[[Any], list[torch.Tensor]]] = {
    "linear": lambda stack: list(stack.parameters()),
    "linear mlp": lambda stack: [c.down.weight for c in stack.corrections],
    "parallel markov": lambda stack: [c.down.weight for c in stack.corrections],
    "linear selector": lambda stack: [stack.rescorer.embedding["after"].weight],
    "nextlat": lambda stack: [stack.depths[0].last.weight],
    "masked": lambda stack: [
        stack.sampler.down.weight, *(u.up.weight for of in stack.updates for u in of.values())
    ],
}  # fmt: skip


@pytest.mark.parametrize("head", ZERO)
def test_matrices_that_start_at_zero_get_gradients(tiny_trunk: TrunkConfig, head: str) -> None:
    model = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=HEADS[head](depth=2)))
    model.initialize(0)
    mtp_loss(model, windows(1, 8, 2), [0.3, 0.3], [8] * 3)[0].backward()
    for parameter in ZERO[head](model.mtp):
        assert not parameter.any() and parameter.grad is not None and parameter.grad.any()


@every_head
def test_weight_zero_has_the_bits_of_training_without_mtp(
    tiny_trunk: TrunkConfig, head: str
) -> None:
    batch = windows(2, 9, 2)
    totals, grads = [], []
    mtp = HEADS[head](depth=2)
    for config, rows in ((mtp, batch), (NoMTPConfig(), WindowBatch(batch.tokens[:, :-2], 0))):
        model = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=config))
        model.initialize(3)
        total, _ = mtp_loss(model, rows, [0.0] * config.depth, [18] * (config.depth + 1))
        total.backward()
        totals.append(total)
        grads.append(gradients(model))
    assert torch.equal(*totals) and grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[1])


@pytest.mark.parametrize("variant", ["sequential", "parallel", "linear"])
def test_only_the_modules_that_active_depths_need_run(
    tiny_trunk: TrunkConfig, variant: str
) -> None:
    """A sequential module needs the shallower ones; parallel and linear heads need no other."""
    model, batch = build(tiny_trunk, variant, depth=3), windows(1, 8, 3)
    calls: list[int] = []
    for k, module in enumerate(model.mtp.depths, start=1):
        module.register_forward_hook(lambda *_, k=k: calls.append(k))
    for active in ([], [2], [1, 3]):
        needed = active if variant != "sequential" else list(range(1, max(active, default=0) + 1))
        calls.clear()
        assert list(model(batch, active)) == [0, *active] and calls == needed
        calls.clear()
        loss, sums = mtp_loss(model, batch, [0.1 * (k in active) for k in (1, 2, 3)], [8] * 4)
        assert calls == needed and [k for k in range(4) if sums[k]] == [0, *active]
        loss.backward()
        modules = enumerate(model.mtp.depths, start=1)
        assert [k for k, m in modules if next(m.parameters()).grad is not None] == needed
        model.zero_grad(set_to_none=True)


def test_stacks_say_whether_they_draft_and_read_tokens(tiny_trunk: TrunkConfig) -> None:
    for name, kind in MTPConfig.variants().items():
        stack = (kind() if name in FIXED_DEPTH else kind(depth=2)).build(tiny_trunk)
        assert not (name in FIXED_DEPTH and stack.reads_tokens)
        assert (stack.max_draft_depth != 0) == (name not in (*FIXED_DEPTH, "parameter_free"))
        if stack.max_draft_depth != 0:
            stack.require_drafts()
        else:
            with pytest.raises(ValueError, match=f"parameter_free|no MTP depth|mtp={name} shapes"):
                stack.require_drafts()
    for name, make in HEADS.items():
        reads = name == "linear selector" or name not in READS_NONE
        assert make(depth=2).build(tiny_trunk).reads_tokens is reads, name
        none = make(depth=0).build(tiny_trunk)
        assert not none.reads_tokens and none.max_draft_depth == 0, name


def test_a_module_may_change_what_its_parts_start_with(
    tiny_trunk: TrunkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(stack: LinearMTP) -> None:
        stack.depths[0].weight.data.fill_(0.5)

    monkeypatch.setattr(LinearMTP, "reset_own_weights", fill, raising=False)
    model = build(tiny_trunk, "linear", depth=2)
    model.initialize(0)
    first, second = model.mtp.depths
    assert (first.weight == 0.5).all() and not second.weight.any()


@pytest.mark.parametrize("variant", sorted(MTPConfig.variants()))
def test_yaml_has_the_defaults_of_the_class_and_configs_round_trip(
    tiny_trunk: TrunkConfig, variant: str
) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose(overrides=[f"+mtp={variant}"])
    # mtp=bag has null there: the data decides.
    mtp = instantiate(cfg.mtp, **({"weights": "idf"} if variant == "bag" else {}))
    kind = MTPConfig.find(variant)
    depth = 3 if variant in ("eagle", "dflash") else 2
    expected = kind() if variant in FIXED_DEPTH else kind(depth=depth)
    assert mtp == expected, "YAML and class disagree"
    config = ModelConfig(trunk=tiny_trunk, mtp=mtp)
    assert config.mtp.variant == variant
    assert ModelConfig.from_dict(config.to_dict()) == config

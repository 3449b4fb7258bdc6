"""Heads of recent papers: equations, what a depth may see, parameters, FLOPs, switches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning import matching
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.mtp.joint import JointConfig
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.mtp.masked import MaskedConfig
from mtp_lightning.mtp.nextlat import NextLatConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.cost import StepCost
from mtp_lightning.objective.schedule.published import constant
from tests.deepseek import trunk as deepseek_trunk
from tests.losses import mtp_loss
from tests.models import build, windows

MLP: dict[str, Any] = {"correction": "mlp"}
MARKOV: dict[str, Any] = {"correction": "markov", "correction_rank": 5}
HEADS: dict[str, Callable[..., MTPConfig]] = {
    "joint": JointConfig,
    "nextlat": NextLatConfig,
    "eagle": EagleConfig,
    "linear mlp": partial(LinearConfig, **MLP),
    "linear markov": partial(LinearConfig, **MARKOV),
    "parallel mlp": partial(ParallelConfig, **MLP),
    "parallel markov": partial(ParallelConfig, **MARKOV),
    "masked": partial(MaskedConfig, lora_rank=4),
}
every_head = pytest.mark.parametrize("head", HEADS)


@every_head
@given(
    row=st.integers(0, 1),
    at=st.integers(0, 5),
    ahead=st.integers(1, 4),
    active=st.sets(st.integers(1, 3), min_size=1),
)
@settings(max_examples=15, deadline=None)
def test_a_depth_sees_the_true_tokens_up_to_its_own_and_no_further(
    head: str, row: int, at: int, ahead: int, active: set[int]
) -> None:
    """Another token ``ahead`` places on changes depth k at ``at`` just if k reads that far."""
    trunk = TrunkConfig(vocab_size=37, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)
    model = build(trunk, HEADS[head](depth=3)).double()
    batch = windows(2, 6, 3)
    tokens = batch.tokens.clone()
    tokens[row, at + ahead] = (tokens[row, at + ahead] + 1) % 37
    wanted = sorted(active)
    before, after = model(batch, wanted), model(WindowBatch(tokens, 3), wanted)
    assert list(before) == [0, *wanted]
    whole = model(batch)
    for k in wanted:
        torch.testing.assert_close(before[k], whole[k])  # whatever else is wanted
        of_one_token = "markov" in head or head == "masked"
        unseen = ahead > k or (of_one_token and ahead < k)
        assert torch.equal(before[k][row, at], after[k][row, at]) == unseen
        assert torch.equal(before[k][1 - row], after[k][1 - row])
    assert torch.equal(before[0][row, at], after[0][row, at])


@every_head
def test_a_head_starts_as_it_is_without_what_starts_at_zero(
    tiny_trunk: TrunkConfig, head: str
) -> None:
    if head in ("joint", "eagle"):
        return  # its layer starts at random, as blocks do
    model = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=HEADS[head](depth=2)))
    model.initialise(0)
    found = model(windows(1, 8, 2))
    if head == "nextlat":
        expected = {k: found[0] for k in range(3)}
    elif head == "masked":  # as the trunk's own states at the masks
        _, at = model.run_trunk(windows(1, 8, 2), [1, 2])
        expected = dict(enumerate([found[0], *at.hidden.chunk(2, -1)]))
    else:
        bare = replace(model.config.mtp, correction="none", correction_rank=None)
        plain = MTPModel(replace(model.config, mtp=bare))
        plain.initialise(0)
        expected = plain(windows(1, 8, 2))
    for k in range(3):
        assert torch.equal(found[k], expected[k])
    mtp_loss(model, windows(1, 8, 2), [0.3, 0.3], [8] * 3)[0].backward()
    if head == "nextlat":
        zero = [model.mtp.depths[0].last.weight]
    elif head == "masked":
        up = [update.up for of in model.mtp.updates for update in of.values()]
        zero = [layer.weight for layer in (model.mtp.sampler.down, *up)]
    else:
        zero = [correction.down.weight for correction in model.mtp.corrections]
    for parameter in zero:
        assert not parameter.any() and parameter.grad is not None and parameter.grad.any()


def test_joint_is_of_the_trunks_own_attention() -> None:
    trunk = deepseek_trunk(vocab_size=37)
    config = ModelConfig(trunk=trunk, mtp=JointConfig(depth=2))
    model = MTPModel(config).double()
    assert type(model.mtp.attention).__name__ == "LatentAttention"
    assert config.num_params() == sum(p.numel() for p in model.parameters())
    model.initialise(0)
    assert model(windows(1, 6, 2))[2].shape == (1, 6, trunk.d_model)


@every_head
def test_weight_zero_is_plain_training_bit_for_bit(tiny_trunk: TrunkConfig, head: str) -> None:
    batch = windows(2, 9, 2)
    totals, grads = [], []
    mtp = HEADS[head](depth=2)
    for config, rows in ((mtp, batch), (NoMTPConfig(), WindowBatch(batch.tokens[:, :-2], 0))):
        model = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=config))
        model.initialise(3)
        total, _ = mtp_loss(model, rows, [0.0] * config.depth, [18] * (config.depth + 1))
        total.backward()
        totals.append(total)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*totals) and grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[1])


@every_head
def test_detach_cuts_where_it_says(tiny_trunk: TrunkConfig, head: str) -> None:
    """The first block's, the head's and the embedding's part of the depths' gradient."""
    if head == "masked":
        return  # the trunk itself makes its states
    trunk = replace(tiny_trunk, tie_embeddings=False)
    for detach, cuts in (
        ("none", (False, False, False)),
        ("trunk", (True, False, "markov" in head)),  # whose table is its own
        ("all", (True, True, True)),
    ):
        if head == "eagle":  # whose head is its own
            cuts = (cuts[0], True, cuts[2])
        model = build(trunk, HEADS[head](depth=2, detach=detach))
        found = []
        for weight in (1.0, 0.0):
            mtp_loss(model, windows(2, 8, 2), [weight] * 2, [16] * 3)[0].backward()
            watched = (
                model.trunk.blocks[0].attention.qkv.weight,
                model.head.weight,
                model.trunk.embedding.weight,
            )
            found.append([parameter.grad.clone() for parameter in watched])
            if weight:
                assert all(p.grad.abs().max() > 1e-7 for p in model.mtp.parameters())
            model.zero_grad()
        for cut, a, b in zip(cuts, *found, strict=True):
            assert bool((a - b).abs().max() < 1e-7) == cut, detach


@every_head
def test_document_masks_and_micro_batches(tiny_trunk: TrunkConfig, head: str) -> None:
    """Gradients add up over micro-batches, and what a mask hides is taught to nobody."""
    model = build(tiny_trunk, HEADS[head](depth=2)).double()
    plain = windows(4, 8, 2)
    documents = (torch.arange(11) >= torch.tensor([[3], [5], [8], [9]])).long()
    batch = WindowBatch(plain.tokens, 2, documents)
    counts = batch.counts().tolist()

    def gradients(batches: list[WindowBatch]) -> dict[str, Tensor]:
        model.zero_grad()
        for part in batches:
            mtp_loss(model, part, [0.2, 0.3], counts, windows=4)[0].backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    whole = gradients([batch])
    for name, gradient in gradients(batch.micro_batches(3)).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-6, atol=1e-9, msg=name)
    for k in (1, 2):
        expected = torch.zeros((), dtype=torch.float64)
        hidden = model(batch)[k]
        for row in range(4):
            for i in range(8):
                if documents[row, i] == documents[row, i + k + 1]:
                    logits = model.head_of(k)(hidden[row, i])
                    expected += torch.logsumexp(logits, 0) - logits[plain.tokens[row, i + k + 1]]
        _, sums = mtp_loss(model, batch, [0.2, 0.3], counts)
        torch.testing.assert_close(sums[k], expected.detach())
    # A token of the next document reaches no position that counts.
    tokens = plain.tokens.clone()
    tokens[documents == 1] = (tokens[documents == 1] + 1) % 37
    scored = documents == 0
    first = [WindowBatch(t, 2, documents, scored) for t in (plain.tokens, tokens)]
    sums = [mtp_loss(model, b, [0.2, 0.3], counts)[1] for b in first]
    assert torch.equal(*sums)


@every_head
def test_runs_are_matched_to_plain_ones(head: str) -> None:
    trunk = TrunkConfig(vocab_size=257, d_model=32, n_layers=8, n_heads=4, n_kv_heads=2, d_ff=96)
    config = ModelConfig(trunk=trunk, mtp=HEADS[head](depth=2))
    length: dict[str, Any] = {"seq_len": 64, "max_steps": 300, "tokens_per_step": 1024}
    for what in ("parameters", "flops"):
        found = matching.match(
            config,
            constant(depth=2, mtp_lambda=0.3),
            match=what,
            reference=matching.plain_reference(config, **length),
            **length,
        )
        assert abs(found.remaining) < 0.05
        if what == "flops":
            plain = ModelConfig(trunk=trunk, mtp=NoMTPConfig())
            steps = 300 * StepCost(plain).per_token(64) / StepCost(config).per_token(64)
            assert found.max_steps == round(steps)


def test_who_reads_true_tokens(tiny_trunk: TrunkConfig) -> None:
    for make in HEADS.values():
        assert make(depth=2).build(tiny_trunk).reads_tokens
        assert not make(depth=0).build(tiny_trunk).reads_tokens


@pytest.mark.parametrize(
    ("build_bad", "message"),
    [
        (lambda: JointConfig(depth=1, branch="top"), "mtp.branch=top is unknown"),
        (lambda: NextLatConfig(depth=1, detach="head"), "mtp.detach=head is unknown"),
        (lambda: NextLatConfig(depth=0, freeze_trunk=True), "leaves nothing to train"),
        (lambda: LinearConfig(depth=1, correction="rnn"), "correction=rnn is unknown: choose one"),
        (lambda: ParallelConfig(depth=1, correction_rank=0), "correction_rank must be a whole"),
        (
            lambda: LinearConfig(depth=1, correction_rank=8),
            "has no meaning with mtp.correction=none",
        ),
    ],
)
def test_bad_switches_are_named(build_bad: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_bad()

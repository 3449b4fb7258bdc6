"""Decoding passes from token ids to logits in one call: they have the bits of the layers, and the
logits of the plain model within rounding."""

from __future__ import annotations

import random

import pytest
import torch

from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.packed import packed_of
from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.precision import round_weights, roundings_of
from mtp_lightning.decoding.session import Session
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.sequential import SequentialMTP
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.trunk import Trunk
from tests.decoding.models import random_prompts, small_model, teacher_forced
from tests.models import build

pytestmark = pytest.mark.skipif(native.library is None, reason=f"needs {native.NEEDED}")

MODELS = {
    "plain": {},
    "one module": {"share_layers": True},
    "before the norm": {"input_norm": "pre", "concat": "hidden_first"},
    "before the last block": {"branch": "before_last"},
    "dropped tokens": {"token_dropout": 0.5},
}


def test_a_head_of_the_stacks_own_is_packed() -> None:
    model = small_model(3, 2, stack="eagle")
    with decoding_passes(model):
        assert model.mtp.own_head is not None
        assert packed_of(model.mtp.own_head.weight) is not None
    assert packed_of(model.mtp.own_head.weight) is None


def sessions(model: MTPModel, slots: int, drafts: int) -> tuple[Session, Session]:
    """A session with fused passes, and one that calls the layers."""
    fused, layers = (Session(model, slots=slots, capacity=80, max_draft=drafts) for _ in range(2))
    assert fused._fused_trunk is not None and all(fused._fused_drafts)
    layers._fused_trunk, layers._fused_drafts = None, [None] * drafts
    return fused, layers


def compare_rounds(fused: Session, layers: Session, drafts: int, seed: int) -> None:
    """Compares all numbers of a few rounds with random acceptance."""
    pair, rng = (fused, layers), random.Random(seed)
    rows = len(fused.n_read)
    for _ in range(6):
        n_drafts = rng.choice((drafts, drafts, 1, 0))
        for k in range(1, n_drafts + 1):
            logits, expected = (session.draft(k).logits_BV for session in pair)
            assert torch.equal(logits, expected)
            assert torch.equal(fused.newest_B1C, layers.newest_B1C)
            for session in pair:
                session.put(expected.argmax(-1, keepdim=True), k)
        logits, expected = (session.verify(n_drafts) for session in pair)
        assert torch.equal(logits, expected)
        accepted = [rng.randint(0, n_drafts) for _ in range(rows)]
        for session in pair:
            session.put(expected.argmax(-1), 1)
            session.accept(accepted)
        for a, b in zip(fused.states, layers.states, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(
            (fused.trunk_cache, *fused.depth_caches),
            (layers.trunk_cache, *layers.depth_caches),
            strict=True,
        ):
            assert all(map(torch.equal, a.entries_L_BSMH, b.entries_L_BSMH))


@pytest.mark.parametrize(
    ("name", "lengths", "precision"),
    [
        *((name, (17, 3, 30), "fp32") for name in MODELS),
        *((name, lengths, "fp32") for name, lengths in (("plain", (9,)), ("one module", (5, 5)))),
        *(("plain", (6, 11), precision) for precision in ("bf16", "int8", "int4")),
    ],
)
def test_fused_passes_have_the_bits_of_the_layers(
    name: str, lengths: tuple[int, ...], precision: str
) -> None:
    model = small_model(3, 2, **MODELS[name])
    round_weights(model, roundings_of(model, precision))
    drafts = 4 if name == "one module" else 2
    (text,) = random_prompts(2, (8,))
    expected = teacher_forced(model, text, 1)[1][-1]
    with decoding_passes(model):
        alone = Session(model, slots=1, capacity=80, max_draft=1)
        alone.join([text[:-1]])
        alone.put_pending(torch.tensor(text[-1:]))
        torch.testing.assert_close(alone.draft(1).logits_BV[0], expected, rtol=1e-4, atol=1e-4)
        fused, layers = sessions(model, len(lengths), drafts)
        for session in (fused, layers):
            logits = session.join(random_prompts(1, lengths))
            session.put_pending(logits.argmax(-1))
        compare_rounds(fused, layers, drafts, seed=len(lengths))
        if len(lengths) > 2:
            for session in (fused, layers):
                session.drop_row(0)
            compare_rounds(fused, layers, drafts, seed=7)


@pytest.mark.parametrize(("n_layers", "head"), [(1, "none"), (3, "eagle")])
def test_many_prompts_together_have_the_bits_of_each_alone(n_layers: int, head: str) -> None:
    """More numbers than PyTorch's operators normalize in one way (``_SMALL`` of layers.py)."""
    trunk = TrunkConfig(
        vocab_size=37, d_model=256, n_layers=n_layers, n_heads=4, n_kv_heads=2, d_ff=48
    )
    model = build(trunk, head, depth=0 if head == "none" else 1).eval()
    prompts = random_prompts(0, (20,) * 24)
    with decoding_passes(model):
        together, *each = (Session(model, slots=24, capacity=20, max_draft=0) for _ in range(25))
        alone = [session.join([ids]) for session, ids in zip(each, prompts, strict=True)]
        assert torch.equal(together.join(prompts), torch.cat(alone))


class UsersTrunk(Trunk):
    """A user's trunk, which might compute anything."""


class UsersStack(SequentialMTP):
    """A user's stack."""


def test_other_models_and_unpacked_ones_have_no_fused_passes() -> None:
    users = small_model(0, 2)
    users.trunk.__class__, users.mtp.__class__ = UsersTrunk, UsersStack
    for model, trunk in (
        (users, False),
        (small_model(0, 2, token_dropout=1.0), True),
        (small_model(0, 2, stack="parallel"), True),
        (small_model(0, 1, stack="linear", rank=2), False),
        (small_model(0, 2, deepseek=True), False),
    ):
        with decoding_passes(model):
            session = Session(model, slots=1, capacity=20, max_draft=1)
            assert (session._fused_trunk is not None) == trunk
            assert session._fused_drafts == [None]
    model = small_model(0, 2)
    unpacked = Session(model, slots=1, capacity=20, max_draft=1)
    assert unpacked._fused_trunk is None and unpacked._fused_drafts == [None]

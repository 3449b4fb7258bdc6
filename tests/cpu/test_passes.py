"""Passes from token ids to logits in one call against the layers they stand for, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch

from mtp_lightning.cpu import library as native
from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.precision import round_weights
from mtp_lightning.decoding.session import Session
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.sequential import SequentialMTP
from mtp_lightning.nn.trunk import Trunk
from tests.decoding.models import random_prompts, small_model

pytestmark = pytest.mark.skipif(native.library is None, reason=f"needs {native.NEEDED}")

MODELS = {
    "plain": {},
    "one module": {"share_layers": True},
    "before the norm": {"input_norm": "pre", "concat": "hidden_first"},
    "before the last block": {"branch": "before_last"},
    "dropped tokens": {"token_dropout": 0.5},
}


def sessions(model: MTPModel, places: int, drafts: int) -> tuple[Session, Session]:
    """One that takes the calls, and one that composes them of layers."""
    whole, layers = (Session(model, slots=places, capacity=80, max_draft=drafts) for _ in range(2))
    assert whole._fused_trunk is not None and all(whole._fused_drafts)
    layers._fused_trunk, layers._fused_drafts = None, [None] * drafts
    return whole, layers


def drafts_and_verifies(whole: Session, layers: Session, drafts: int, seed: int) -> None:
    """A few rounds of random acceptance, with every number of both compared."""
    pair, chance = (whole, layers), random.Random(seed)
    rows = whole.batch_size
    for _ in range(6):
        n_drafts = chance.choice((drafts, drafts, 1, 0))
        for k in range(1, n_drafts + 1):
            found, expected = (session.draft(k).logits_BV for session in pair)
            assert torch.equal(found, expected)
            assert torch.equal(whole.newest_B1C, layers.newest_B1C)
            for session in pair:
                session.put(expected.argmax(-1, keepdim=True), k)
        found, expected = (session.verify(n_drafts) for session in pair)
        assert torch.equal(found, expected)
        accepted = [chance.randint(0, n_drafts) for _ in range(rows)]
        for session in pair:
            session.put(expected.argmax(-1), 1)
            session.accept(accepted)
        for a, b in zip(whole.states, layers.states, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(
            (whole.trunk_cache, *whole.depth_caches),
            (layers.trunk_cache, *layers.depth_caches),
            strict=True,
        ):
            assert all(map(torch.equal, a.entries_L_BSMH, b.entries_L_BSMH))


@pytest.mark.parametrize(
    ("name", "lengths"),
    [*((name, (17, 3, 30)) for name in MODELS), ("plain", (9,)), ("one module", (5, 5))],
)
def test_numbers_are_those_of_the_layers(name: str, lengths: tuple[int, ...]) -> None:
    model = small_model(3, 2, **MODELS[name])
    drafts = 4 if name == "one module" else 2
    with decoding_passes(model):
        whole, layers = sessions(model, len(lengths), drafts)
        for session in (whole, layers):
            logits = session.join(random_prompts(1, lengths))
            session.put_pending(logits.argmax(-1))
        drafts_and_verifies(whole, layers, drafts, seed=len(lengths))
        if len(lengths) > 2:
            for session in (whole, layers):
                session.drop_row(0)
            drafts_and_verifies(whole, layers, drafts, seed=7)


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_rounded_weights_too(precision: str) -> None:
    model = small_model(4, 2)
    round_weights(model, precision)
    with decoding_passes(model):
        whole, layers = sessions(model, 2, 2)
        for session in (whole, layers):
            session.put_pending(session.join(random_prompts(2, (6, 11))).argmax(-1))
        drafts_and_verifies(whole, layers, 2, seed=0)


class OwnTrunk(Trunk):
    """A user's, which might compute anything."""


class OwnStack(SequentialMTP):
    """Likewise."""


def test_what_is_not_known_is_computed_by_its_layers() -> None:
    own = small_model(0, 2)
    own.trunk.__class__, own.mtp.__class__ = OwnTrunk, OwnStack
    for model, trunk in (
        (own, False),
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

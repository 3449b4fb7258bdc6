"""DFlash 2's candidate selector: its drafts, and what is measured of them.

``tests/objective/test_cross_product.py`` compares the losses and gradients of a step, and so the
scores of training, with the definition, for every objective.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.rates import rates_of
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp import selector
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.chunk import Chunk
from mtp_lightning.nn.config import TrunkConfig
from tests.decoding.models import random_prompts, small_model, teacher_forced
from tests.models import build, windows

SELECTOR: dict[str, Any] = {"correction": "selector", "correction_rank": 5}
HEADS = ("parallel", "linear")
VOCAB, DEPTH, SEQ_LEN = 37, 3, 7
every_head = pytest.mark.parametrize("head", HEADS)


def model_of(trunk: TrunkConfig, head: str = "parallel", **switches: Any) -> MTPModel:
    """A model in float64 with random weights."""
    config = MTPConfig.find(head)(depth=DEPTH, **{**SELECTOR, **switches})
    return build(trunk, config).double().eval()


@every_head
@torch.no_grad()
def test_a_new_selector_drafts_as_the_head_without_it(tiny_trunk: TrunkConfig, head: str) -> None:
    switches = {"depth": DEPTH, **SELECTOR}
    model = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=MTPConfig.find(head)(**switches)))
    plain = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=MTPConfig.find(head)(depth=DEPTH)))
    model.initialize(2)
    plain.initialize(2)
    batch = windows(3, SEQ_LEN, DEPTH)
    states, expected = model(batch), plain(batch)
    for k in range(1, DEPTH + 1):
        assert torch.equal(states[k], expected[k])
        drafted = model.draft_logits(k, states[k], batch.tokens[:, k : k + SEQ_LEN])
        logits = plain.head(expected[k])
        candidates = drafted.isfinite()
        assert torch.equal(drafted[candidates], logits[candidates])
        assert (candidates.sum(-1) == 16).all()
        assert torch.equal(drafted.argmax(-1), logits.argmax(-1))


def trained_scores(model: MTPModel, text: list[int], k: int) -> Tensor:
    """The scores [V] that the loss computes for depth k's target after a text, up to a constant;
    -inf for a token that is not a candidate."""
    n = len(text) - k  # tokens that the trunk has read
    window = torch.tensor([[*text, *[0] * (model.depth + 1)]])[:, : n + model.depth + 1]
    hidden_C = model(WindowBatch(window, model.depth))[k][0, -1]
    log_q_V = torch.log_softmax(model.head(hidden_C), -1)
    ids = log_q_V.topk(selector.CANDIDATES).indices
    before = torch.tensor([text[-1]])
    scores = torch.full_like(log_q_V, -math.inf)
    for b in ids:  # the loss of each candidate as the target
        chunk = Chunk(k, log_q_V[None], b[None], hidden_C[None], before_R=before)
        scores[b] = -model.mtp.rescorer.value(chunk)[0]
    return scores


@every_head
@torch.no_grad()
def test_the_scores_of_drafts_are_those_of_training(head: str) -> None:
    """They read no token after the one before the draft."""
    model = small_model(3, DEPTH, stack=head, **SELECTOR)
    (text,) = random_prompts(3, (14,))
    drafted = teacher_forced(model, text, DEPTH)
    for k, n in itertools.product(range(1, DEPTH + 1), (4, 9)):
        expected = trained_scores(model, text[: n + k], k)
        scores = torch.log_softmax(drafted[k][n - 1], -1)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rates_are_those_of_the_rescored_drafts(tiny_trunk: TrunkConfig) -> None:
    model, batch = model_of(tiny_trunk), windows(2, 12, DEPTH)
    rates = rates_of(model)
    rates.update(model, batch, model(batch))
    values = rates.compute()
    main = model.head(model(batch)[0])
    for k, hidden_BTC in list(model(batch).items())[1:]:
        logits = model.head(hidden_BTC)
        drafted = model.draft_logits(k, hidden_BTC, batch.tokens[:, k : k + 12])
        target = batch.targets(k)
        is_candidate = drafted.gather(-1, target.unsqueeze(-1)).isfinite()
        shared = torch.minimum(drafted[:, :-k].softmax(-1), main[:, k:].softmax(-1)).sum(-1)
        agreed = drafted[:, :-k].argmax(-1) == main[:, k:].argmax(-1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        assert 0 < float(is_candidate.double().mean()) < 1
        for name, value in (
            ("candidate_recall", is_candidate),
            ("accuracy", drafted.argmax(-1) == target),
            ("agreement", agreed),
            ("overlap", shared),
            ("loss", loss),  # of the head's logits, since a target may not be a candidate
        ):
            expected = float(value.double().mean())
            assert values[f"{name}_depth_{k}"] == pytest.approx(expected, rel=1e-6), name
    assert "candidate_recall" not in rates_of(small_model(0, 1)).metric_state


def test_the_default_ranks_of_corrections() -> None:
    linear = MTPConfig.find("linear")
    assert linear(depth=1, correction="selector").columns == 256
    assert linear(depth=1, correction="markov").columns == 64

"""``min_confidence``: drafting stops where the model expects a draft to fail; the text stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mtp_lightning.decoding import compiled, generate, speculative
from mtp_lightning.decoding.adaptive import AutoDepth, _Rounds
from mtp_lightning.decoding.session import Session
from mtp_lightning.decoding.speculative import top_probability
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import Confidence
from mtp_lightning.nn.config import TrunkConfig
from tests.decoding.models import ids_of
from tests.models import build

PROMPTS = [[1, 2, 3], [4, 5]]


def model_of(trunk: TrunkConfig, variant: str, confidence: float) -> MTPModel:
    """A model with the same confidence at every depth and in every draft."""
    model = build(trunk, variant, depth=3, confidence=True)
    assert model.mtp.confidence is not None
    torch.nn.init.zeros_(model.mtp.confidence.weight)
    torch.nn.init.constant_(model.mtp.confidence.bias, torch.logit(torch.tensor(confidence)).item())
    return model


@pytest.mark.parametrize(("variant", "temperature"), [("sequential", 0.0), ("parallel", 1.0)])
def test_drafting_stops_when_the_product_of_confidences_is_too_low(
    tiny_trunk: TrunkConfig, monkeypatch: pytest.MonkeyPatch, variant: str, temperature: float
) -> None:
    """The products are 1/2, 1/4 and 1/8; deeper drafts are never judged."""
    model = model_of(tiny_trunk, variant, 0.5)
    drafted, draft = set[int](), Session.draft
    monkeypatch.setattr(Session, "draft", lambda self, k: drafted.add(k) or draft(self, k))
    for least, drafts in ((0.0, 3), (0.1, 3), (1 / 4, 2), (0.3, 1), (0.6, 0)):
        texts = generate(
            model, PROMPTS, max_new_tokens=24, temperature=temperature, min_confidence=least
        )
        # The confidence of a draft is known once it is made, and the next one is then left out.
        assert max(drafted) == min(drafts + 1, 3)
        drafted.clear()
        reached = [sum(text.drafts_reached[j] for text in texts) for j in range(3)]
        assert [count > 0 for count in reached[:1]] == [drafts > 0]
        assert not any(reached[drafts:])
        if drafts == 0:
            assert all(text.tokens_per_step == 1 for text in texts)


def test_without_a_confidence_layer_the_drafts_probability_counts(
    tiny_trunk: TrunkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_trunk, "sequential", depth=1)
    confidences: list[float] = []

    def recorded(logits_BV: torch.Tensor) -> torch.Tensor:
        probability = top_probability(logits_BV)
        confidences.append(probability.item())
        return probability

    monkeypatch.setattr(speculative, "top_probability", recorded)
    options: dict[str, Any] = {"max_new_tokens": 40, "draft_depth": 1, "eot_id": -1}
    generate(model, PROMPTS[:1], min_confidence=1e-9, **options)
    median = sorted(confidences)[len(confidences) // 2]
    confidences.clear()
    (text,) = generate(model, PROMPTS[:1], min_confidence=median, **options)
    # The last round may have no room for a draft.
    assert sum(c >= median for c in confidences) - text.drafts_reached[0] in (0, 1)
    assert 0 < text.drafts_reached[0] < len(confidences)


def test_the_probability_of_the_likeliest_token_equals_the_softmax() -> None:
    logits = 8 * torch.randn(6, 40)
    logits[2, 3:] = -torch.inf  # as of a head with few rows
    logits[3, 1:] = -torch.inf
    for x in (logits, logits.bfloat16()):
        expected = x.double().softmax(dim=-1).amax(dim=-1)
        torch.testing.assert_close(top_probability(x).double(), expected, rtol=1e-5, atol=0)


def test_a_draft_beyond_the_trained_depths_has_the_confidence_of_the_last_one() -> None:
    layers, hidden = Confidence(2, 5), torch.randn(3, 5)
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter)
    for k, depth in ((1, 1), (2, 2), (3, 2), (9, 2)):
        expected = hidden @ layers.weight[depth - 1] + layers.bias[depth - 1]
        torch.testing.assert_close(layers(k, hidden), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_compiled_passes_stop_drafting_where_eager_ones_do(
    tiny_trunk: TrunkConfig, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "program", lambda function, inputs: function)
    for model, least in (
        (model_of(tiny_trunk, "sequential", 0.8), 0.6),
        (build(tiny_trunk, "sequential", depth=3, confidence=True), 0.3),
        (build(tiny_trunk, "sequential", depth=3, confidence=True), 0.5),
        (build(tiny_trunk, "sequential", depth=3), 0.04),
    ):
        options: dict[str, Any] = {"temperature": temperature, "min_confidence": least}
        eager, fast = (
            generate(model, PROMPTS, max_new_tokens=24, compile=way, batch_size=1, **options)
            for way in (False, True)
        )
        assert ids_of(fast) == ids_of(eager)
        assert [t.drafts_accepted for t in fast] == [t.drafts_accepted for t in eager]


def test_auto_depth_counts_a_draft_that_was_not_made_as_rejected(
    tiny_trunk: TrunkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its expected number of tokens is then the real one."""
    rounds: list[tuple[int, list[int], list[int]]] = []

    def record(
        self: AutoDepth, m: int, seconds: float, accepted: Sequence[int], reached: Sequence[int]
    ) -> None:
        rounds.append((m, list(accepted), list(reached)))
        real(self, m, seconds, accepted, reached)

    real = AutoDepth.record
    monkeypatch.setattr(AutoDepth, "record", record)
    monkeypatch.setattr(_Rounds, "_FIRST", 2)  # it probes soon
    model = model_of(tiny_trunk, "sequential", 0.8)
    plain = generate(model, PROMPTS, max_new_tokens=40, speculative=False)
    auto = generate(model, PROMPTS, max_new_tokens=40, draft_depth="auto", min_confidence=0.7)
    assert ids_of(auto) == ids_of(plain)
    assert {m for m, _, _ in rounds} >= {0, 3}
    for m, accepted, reached in rounds:
        # At most one draft is made; the second one counts as rejected.
        assert max(accepted) <= min(m, 1)
        assert all(r == min(a + 1, m) for a, r in zip(accepted, reached, strict=True))

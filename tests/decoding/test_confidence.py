"""Drafting stops where the model does not believe in its drafts; the text is the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mtp_lightning.decoding import compiled, generate, speculative
from mtp_lightning.decoding.adaptive import AutoDepth, _Rounds
from mtp_lightning.decoding.speculative import likeliest
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.config import TrunkConfig
from tests.decoding.models import ids_of
from tests.models import build

PROMPTS = [[1, 2, 3], [4, 5]]


def model(trunk: TrunkConfig, variant: str, sure: float) -> MTPModel:
    """A model whose every depth says ``sure``, whatever it drafts."""
    made = build(trunk, variant, depth=3, confidence=True)
    assert made.mtp.confidence is not None
    torch.nn.init.zeros_(made.mtp.confidence.weight)
    torch.nn.init.constant_(made.mtp.confidence.bias, torch.logit(torch.tensor(sure)).item())
    return made


@pytest.mark.parametrize(("variant", "temperature"), [("sequential", 0.0), ("parallel", 1.0)])
def test_the_number_of_drafts_follows_the_product(
    tiny_trunk: TrunkConfig, variant: str, temperature: float
) -> None:
    """0.8, 0.64, 0.512: so many drafts are left, and none of the deeper ones is ever judged."""
    made = model(tiny_trunk, variant, 0.8)
    for least, drafts in ((0.0, 3), (0.5, 3), (0.6, 2), (0.7, 1), (0.9, 0)):
        done = generate(
            made, PROMPTS, max_new_tokens=24, temperature=temperature, min_confidence=least
        )
        reached = [sum(row.drafts_reached[j] for row in done) for j in range(3)]
        assert [count > 0 for count in reached[:1]] == [drafts > 0]
        assert not any(reached[drafts:])
        if drafts == 0:
            assert all(row.tokens_per_step == 1 for row in done)


def test_without_an_estimate_the_likeliest_draft_counts(
    tiny_trunk: TrunkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first draft of a round is made where its own probability is high enough."""
    made = build(tiny_trunk, "sequential", depth=1)
    seen: list[float] = []

    def spied(logits_BV: torch.Tensor) -> torch.Tensor:
        found = likeliest(logits_BV)
        seen.append(found.item())
        return found

    monkeypatch.setattr(speculative, "likeliest", spied)
    settings = {"max_new_tokens": 40, "draft_depth": 1, "eot_id": -1}
    generate(made, PROMPTS[:1], min_confidence=1e-9, **settings)  # type: ignore[arg-type]
    least = sorted(seen)[len(seen) // 2]
    seen.clear()
    (text,) = generate(made, PROMPTS[:1], min_confidence=least, **settings)  # type: ignore[arg-type]
    # The last round may have no room for a draft that it believes in.
    assert sum(s >= least for s in seen) - text.drafts_reached[0] in (0, 1)
    assert 0 < text.drafts_reached[0] < len(seen)


def test_the_likeliest_tokens_probability() -> None:
    logits = 8 * torch.randn(6, 40)
    logits[2, 3:] = -torch.inf  # as of a short head
    logits[3, 1:] = -torch.inf
    expected = logits.double().softmax(dim=-1).amax(dim=-1)
    torch.testing.assert_close(likeliest(logits).double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        likeliest(logits.bfloat16()).double(),
        logits.bfloat16().double().softmax(dim=-1).amax(dim=-1),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_compiled_passes_stop_where_eager_ones_do(
    tiny_trunk: TrunkConfig, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "program", lambda function, inputs: function)
    for sure, least in ((0.8, 0.6), (None, 0.3), (None, 0.5), (None, 0.04)):
        made = build(tiny_trunk, "sequential", depth=3, confidence=least > 0.1)
        made = made if sure is None else model(tiny_trunk, "sequential", sure)
        settings = {"temperature": temperature, "min_confidence": least, "batch_size": 1}
        eager, found = (
            generate(made, PROMPTS, max_new_tokens=24, compile=way, **settings)  # type: ignore[arg-type]
            for way in (False, True)
        )
        assert ids_of(found) == ids_of(eager)
        assert [r.drafts_accepted for r in found] == [r.drafts_accepted for r in eager]


def test_auto_takes_what_is_not_believed_for_what_fails(
    tiny_trunk: TrunkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It then expects as many tokens of a number of drafts as come."""
    rounds: list[tuple[int, list[int], list[int]]] = []

    def record(
        self: AutoDepth, m: int, seconds: float, accepted: Sequence[int], reached: Sequence[int]
    ) -> None:
        rounds.append((m, list(accepted), list(reached)))
        real(self, m, seconds, accepted, reached)

    real = AutoDepth.record
    monkeypatch.setattr(AutoDepth, "record", record)
    monkeypatch.setattr(_Rounds, "_FIRST", 2)  # it probes soon
    made = model(tiny_trunk, "sequential", 0.8)
    options = {"max_new_tokens": 40, "min_confidence": 0.7}
    plain = generate(made, PROMPTS, max_new_tokens=40, speculative=False)
    found = generate(made, PROMPTS, draft_depth="auto", **options)  # type: ignore[arg-type]
    assert ids_of(found) == ids_of(plain)
    assert {m for m, _, _ in rounds} >= {0, 3}
    for m, accepted, reached in rounds:
        # One draft at most is made; the second is the one that was not.
        assert max(accepted) <= min(m, 1)
        assert all(r == min(a + 1, m) for a, r in zip(accepted, reached, strict=True))

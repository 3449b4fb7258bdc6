"""Drafting stops where the model does not believe in its drafts; the text is the same."""

from __future__ import annotations

import pytest
import torch

from mtp_lightning.decoding import generate
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from tests.models import build

PROMPTS = [[1, 2, 3], [4, 5]]


def model(trunk: TrunkConfig, variant: str, sure: float) -> MTPModel:
    """A model whose every depth says ``sure``, whatever it drafts."""
    made = build(trunk, MTPConfig.find(variant)(depth=3, confidence=True))
    assert made.mtp.confidence is not None
    torch.nn.init.zeros_(made.mtp.confidence.weight)
    torch.nn.init.constant_(made.mtp.confidence.bias, torch.logit(torch.tensor(sure)).item())
    return made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("variant", ["sequential", "parallel"])
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


@pytest.mark.parametrize("variant", ["sequential", "parallel", "linear"])
def test_greedy_text_is_that_of_plain_decoding(tiny_trunk: TrunkConfig, variant: str) -> None:
    made = build(tiny_trunk, MTPConfig.find(variant)(depth=3, confidence=True))
    plain = generate(made, PROMPTS, max_new_tokens=30, speculative=False)
    for least in (0.1, 0.3, 0.5):
        found = generate(made, PROMPTS, max_new_tokens=30, min_confidence=least)
        assert [row.token_ids for row in found] == [row.token_ids for row in plain]


def test_what_makes_no_sense_is_refused(tiny_trunk: TrunkConfig) -> None:
    made = model(tiny_trunk, "sequential", 0.8)
    without = build(tiny_trunk, MTPConfig.find("sequential")(depth=3))
    settings = {"max_new_tokens": 4, "min_confidence": 0.5}
    with pytest.raises(ValueError, match=r"min_confidence=0.5 needs a model .*\.confidence=true"):
        generate(without, PROMPTS, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not go together with speculative=false"):
        generate(made, PROMPTS, speculative=False, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not go together with draft_depth=auto"):
        generate(made, PROMPTS, draft_depth="auto", **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"min_confidence must be a number in \[0, 1\], not 2"):
        generate(made, PROMPTS, max_new_tokens=4, min_confidence=2)

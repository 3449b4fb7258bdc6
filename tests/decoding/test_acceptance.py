"""Acceptance by position and entropy is that of the verify loop."""

from __future__ import annotations

import math

import pytest
import torch

from mtp_lightning.decoding.acceptance import acceptance_by, first_drafts
from mtp_lightning.decoding.generate import generate
from tests.decoding.models import random_prompts, small_model, steer_drafts, teacher_forced

NEW = 40


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("chance", [0.0, 0.6, 1.0])
def test_against_the_loops_own_counts(
    monkeypatch: pytest.MonkeyPatch, depth: int, chance: float
) -> None:
    model = small_model(0, depth)
    prompts = random_prompts(0, (3, 5, 9))
    plain = generate(model, prompts, max_new_tokens=NEW, speculative=False)
    texts = [[*p, *g.token_ids] for p, g in zip(prompts, plain, strict=True)]
    steer_drafts(monkeypatch, texts, chance=chance)
    found = generate(model, prompts, max_new_tokens=NEW)
    drafts = [first_drafts(g, NEW) for g in found]
    for generation, places in zip(found, drafts, strict=True):
        assert len(places) == generation.drafts_reached[0]
        assert sum(taken for _, taken in places) == generation.drafts_accepted[0]
    values = acceptance_by(model, prompts, found, max_new_tokens=NEW)

    at, entropy, taken, of_text = [], [], [], []
    for number, (prompt, text, places) in enumerate(zip(prompts, texts, drafts, strict=True)):
        p_TV = teacher_forced(model, [*text, *[0] * depth], 0)[0].double().softmax(-1)
        for place, accepted in places:
            at.append(len(prompt) + place + 1)
            p_V = p_TV[len(prompt) + place - 1]
            entropy.append(-sum(float(p) * math.log(p) for p in p_V))
            taken.append(accepted)
            of_text.append(number)
    for low in (4, 8, 16, 32):
        inside = [t for a, t in zip(at, taken, strict=True) if low <= a < 2 * low]
        if inside:
            share = sum(inside) / len(inside)
            assert values[f"acceptance_at_{low}-{2 * low - 1}"] == pytest.approx(share)
    for low, high in ((0, 0.5), (0.5, 1), (1, 2), (2, 4)):
        inside = [t for e, t in zip(entropy, taken, strict=True) if low <= e < high]
        if inside:
            share = sum(inside) / len(inside)
            assert values[f"acceptance_entropy_{low}-{high}"] == pytest.approx(share)
    ones = torch.ones(len(taken), dtype=torch.float64)
    y = torch.tensor(taken, dtype=torch.float64)
    for name, x in (("entropy", entropy), ("position", [math.log2(a) for a in at])):
        table = torch.stack((ones, torch.tensor(x, dtype=torch.float64)), 1)
        line = torch.linalg.lstsq(table, y.unsqueeze(1)).solution
        assert values[f"acceptance_slope_{name}"] == pytest.approx(float(line[1]), abs=1e-5)
        # The sandwich of Liang & Zeger 1986, text by text, with G / (G - 1).
        residual = y - (table @ line).squeeze(1)
        bread, meat = torch.linalg.inv(table.T @ table), torch.zeros(2, 2, dtype=torch.float64)
        for number in range(3):
            rows = [i for i, g in enumerate(of_text) if g == number]
            pull = table[rows].T @ residual[rows]
            meat += torch.outer(pull, pull)
        variance = (bread @ meat @ bread)[1, 1] * 3 / 2
        assert values[f"acceptance_slope_{name}_se"] == pytest.approx(
            float(variance.clamp(min=0).sqrt()), abs=1e-5
        )


def test_one_text_has_a_slope_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = small_model(0, 1), random_prompts(0, (5,))
    plain = generate(model, prompts, max_new_tokens=NEW, speculative=False)
    steer_drafts(monkeypatch, [[*prompts[0], *plain[0].token_ids]], chance=0.5)
    found = generate(model, prompts, max_new_tokens=NEW)
    values = acceptance_by(model, prompts, found, max_new_tokens=NEW)
    assert "acceptance_slope_position" in values
    assert "acceptance_slope_position_se" not in values


def test_without_drafts_there_is_nothing() -> None:
    model, prompts = small_model(0, 0), random_prompts(0, (3,))
    found = generate(model, prompts, max_new_tokens=1)
    assert acceptance_by(model, prompts, found, max_new_tokens=1) == {}

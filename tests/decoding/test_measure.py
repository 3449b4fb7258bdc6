"""Acceptance rates and speed of drafting, their expected values, and the check of greedy texts."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from mtp_lightning.decoding import fused, generate, measure
from mtp_lightning.decoding.acceptance import acceptance_by, first_drafts
from mtp_lightning.decoding.lookup import lookups_alone
from mtp_lightning.decoding.measure import (
    PassCosts,
    Race,
    acceptance,
    decoding_report,
    intervals,
    pass_costs,
    rates,
    require_same_greedy,
    teacher_forced_rates,
)
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from tests.decoding.models import (
    generation,
    ids_of,
    random_prompts,
    small_model,
    steer_drafts,
    teacher_forced,
)


def test_rates_are_pooled_over_texts_and_not_averaged() -> None:
    pooled = rates([generation([9, 3], [10, 9], 10, 23), generation([0, 0], [2, 1], 2, 3)])
    assert pooled["acceptance_position_1"] == pytest.approx(9 / 12)
    assert pooled["acceptance_position_2"] == pytest.approx(3 / 10)
    assert pooled["tokens_per_step"] == pytest.approx((22 + 2) / 12)


def test_intervals_are_those_of_a_bootstrap_over_prompts() -> None:
    """The reference draws one prompt at a time, with the same seed."""
    texts = [
        generation([n, n // 2], [n + 2, n], n + 2, 2 * n + 3 + n % 3) for n in (4, 1, 9, 7, 3, 12)
    ]
    generator = np.random.default_rng(0)
    draws: dict[str, list[float]] = {}
    for drawn in generator.integers(6, size=(1000, 6)):
        for name, value in rates([texts[i] for i in drawn]).items():
            draws.setdefault(name, []).append(value)
    bounds = intervals(texts)
    assert len(bounds) == 6
    for name, value in rates(texts).items():
        low, high = np.percentile(draws[name], (2.5, 97.5))
        assert bounds[f"{name}_low"] == pytest.approx(low, rel=1e-6)
        assert bounds[f"{name}_high"] == pytest.approx(high, rel=1e-6)
        assert low < value < high


def test_intervals_of_equal_prompts_are_points_and_one_prompt_has_none() -> None:
    text = generation([3, 0], [4, 3], 4, 9)
    bounds = intervals([text] * 5)
    for name, value in rates([text]).items():
        assert bounds[f"{name}_low"] == bounds[f"{name}_high"] == value
    assert intervals([text]) == {}
    # Nor has a position that no draft reached.
    assert "acceptance_position_2_low" not in intervals([replace(text, drafts_reached=[4, 0])] * 2)


@pytest.mark.parametrize("lookup", [0, 5])
def test_acceptance_does_not_depend_on_the_batch(lookup: int) -> None:
    model, options = small_model(3, 2, vocab=3), DecodingOptions(max_new_tokens=20, lookup=lookup)
    prompts = random_prompts(3, (4, 1, 9, 6), vocab=3)
    report, plain = acceptance(model, prompts, options)
    alone = [generate(model, [prompt], options)[0] for prompt in prompts]
    setting = {"n_prompts": 4.0, "new_tokens": 20.0}
    assert report == rates(alone) | intervals(alone) | lookups_alone(prompts, alone) | setting
    assert ids_of(plain) == ids_of(alone)
    assert report["acceptance_position_1_low"] < report["acceptance_position_1_high"]


def test_the_speedup_of_a_race_is_that_of_its_median_pair() -> None:
    run = Race({}, {"plain": [2.0, 9.0, 3.0], "drafted": [1.0, 1.0, 2.0]})
    assert run.speedup("drafted") == 2.0
    assert run.speedup("plain", over="drafted") == 0.5


def test_costs_of_passes_give_the_expected_speedup() -> None:
    costs = PassCosts(verify=[4.0, 5.0, 6.0], draft=[1.0, 1.0])
    assert costs.speedup(3.0) == pytest.approx(3 * 4 / (6 + 2))
    measured = pass_costs(small_model(0, 2), [1, 2, 3], repeats=2)
    assert len(measured.verify) == 3 and len(measured.draft) == 2
    assert min(*measured.verify, *measured.draft) > 0
    # The first ten calls are not timed.
    times = itertools.chain.from_iterable((0, seconds) for seconds in [9.0] * 10 + [1.0, 2.0, 4.0])
    assert measure._seconds(lambda: None, 3, lambda: next(times)) == 2.0
    for n in (1, 2):  # fewer tokens than depths
        assert min(pass_costs(small_model(0, 4), [1] * n, repeats=2).draft) > 0


@pytest.mark.parametrize("share_layers", [False, True])
def test_teacher_forced_rates_are_those_of_drafting_at_every_position(share_layers: bool) -> None:
    """The reference drafts from each position without a cache. The vocabulary has three tokens, so
    that random modules are often right."""
    model = small_model(3, 3, vocab=3, share_layers=share_layers)
    prompts = random_prompts(3, (4, 1, 9), vocab=3)
    texts = generate(model, prompts, max_new_tokens=30, speculative=False)
    right, reached, passes = [0] * 3, [0] * 3, 0
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = [*prompt, *text.token_ids]
        for pending in range(len(prompt), len(tokens) - 3):
            passes += 1
            read = tokens[: pending + 1]
            for k in range(1, 4):
                reached[k - 1] += 1
                draft = int(teacher_forced(model, read, k)[k][-1].argmax())
                if draft != tokens[pending + k]:
                    break
                right[k - 1] += 1
                read.append(draft)
    values = teacher_forced_rates(model, prompts, texts)
    assert values.pop("expected_tokens_per_step") == pytest.approx(1 + sum(right) / passes)
    expected = {f"agreement_position_{j + 1}": right[j] / reached[j] for j in range(3)}
    assert values == pytest.approx(expected)
    assert 0 < expected["agreement_position_2"] < 1


def test_texts_that_are_too_short_have_no_teacher_forced_rates() -> None:
    model = small_model(3, 2)
    texts = generate(model, [[1, 2]], max_new_tokens=2)
    assert teacher_forced_rates(model, [[1, 2]], texts) == {}


def test_a_report_has_the_measured_and_the_expected_values() -> None:
    model, options = small_model(3, 2, vocab=3), DecodingOptions(max_new_tokens=20)
    prompts = [torch.tensor(prompt) for prompt in random_prompts(3, (4, 1, 9), vocab=3)]
    report = decoding_report(model, prompts, options)
    values, plain = acceptance(model, prompts, options)
    assert report.items() >= (values | teacher_forced_rates(model, prompts, plain)).items()
    assert report["speedup"] > 0 and report["expected_speedup"] > 0


def test_a_race_prepares_the_model_once(monkeypatch) -> None:
    """Packing the weights is not a part of decoding's time."""
    entered = []
    code = fused._code("cpu")
    if code is None:
        pytest.skip("no code prepares models here")
    passes = code.passes
    counted = replace(code, passes=lambda model: entered.append(model) or passes(model))
    monkeypatch.setattr(fused, "_code", lambda device: counted)
    options = DecodingOptions(max_new_tokens=3, batch_size=1)
    model, ways = small_model(1, 1), {"plain": options.plain(), "drafted": options}
    measure.race(model, random_prompts(1, (4, 5)), ways, repeats=2)
    assert len(entered) == 1


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_race_warms_up_and_alternates_the_order(monkeypatch, batch_size: int) -> None:
    """The first call of each way with so many prompts takes ten times as long, and each call is
    slower than the last."""
    calls: list[str] = []
    sizes: set[tuple[str, int]] = set()
    now = 0.0

    def decode(model, prompts, options, *, tokenizer):
        nonlocal now
        name = "drafted" if options.speculative else "plain"
        pace = {"plain": 2.0, "drafted": 1.0}[name] * (1 + 0.1 * len(calls)) * len(prompts)
        now += pace * (10.0 if (name, len(prompts)) not in sizes else 1.0)
        calls.append(name)
        sizes.add((name, len(prompts)))
        return [f"{name} {p}" for p in prompts]

    monkeypatch.setattr(measure, "generate", decode)
    monkeypatch.setattr(measure, "fused_passes", nullcontext)
    options = DecodingOptions(batch_size=batch_size)
    ways = {"plain": options.plain(), "drafted": options}
    run = measure.race(None, ["a", "b"], ways, repeats=2, clock=lambda: now)
    forward, back = ["plain", "drafted"], ["drafted", "plain"]
    turns = [forward, forward, back, forward, back] if batch_size == 1 else [forward, forward, back]
    assert calls == [name for turn in turns for name in turn]
    assert run.outputs["drafted"] == ["drafted a", "drafted b"]
    assert len(run.seconds["plain"]) == 2 and max(run.seconds["drafted"]) < 5
    assert run.speedup("drafted") == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 4), (7.0, 7), (99.0, 9)])
def test_a_short_race_takes_the_prompts_that_the_time_allows(
    monkeypatch: pytest.MonkeyPatch, seconds: float, expected: int
) -> None:
    """At least four, at most all; one takes half a second in each of two ways."""
    clock = itertools.count(step=0.5).__next__
    monkeypatch.setattr(measure, "race", partial(measure.race, clock=clock))
    options = DecodingOptions(max_new_tokens=3, batch_size=1)
    ways, prompts = {"plain": options.plain(), "drafted": options}, random_prompts(1, [3] * 9)
    run = measure.short_race(small_model(1, 1), prompts, ways, seconds=seconds)
    assert [len(run.outputs[name]) for name in ways] == [expected, expected]


def test_another_greedy_token_is_an_error_with_its_position() -> None:
    model = small_model(0, 2)
    prompt = [1, 2, 3]
    (plain,) = generate(model, [prompt], max_new_tokens=8, speculative=False)
    require_same_greedy(model, [prompt], [plain], [replace(plain)])
    wrong = list(plain.token_ids)
    wrong[4] = (wrong[4] + 1) % 37
    other = replace(plain, token_ids=wrong)
    for one, two in ((plain, other), (other, plain)):
        with pytest.raises(RuntimeError, match="at new token 4 after the prompt"):
            require_same_greedy(model, [prompt], [one], [two])
    short = replace(plain, token_ids=plain.token_ids[:-1])
    with pytest.raises(RuntimeError, match="at new token 7"):
        require_same_greedy(model, [prompt], [plain], [short])


def test_another_token_of_the_same_logit_is_not_an_error(tiny_trunk: TrunkConfig) -> None:
    """Rounding may choose either of the two."""
    model = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=SequentialConfig(depth=2)))
    model.initialize(0)
    prompt = [1, 2, 3]
    (text,) = generate(model, [prompt], max_new_tokens=4, speculative=False)
    chosen = text.token_ids[2]
    twin = (chosen + 1) % 37
    with torch.no_grad():
        model.trunk.embedding.weight[twin] = model.trunk.embedding.weight[chosen]
    (tied,) = generate(model, [prompt], max_new_tokens=4, speculative=False)
    at = next(i for i, token in enumerate(tied.token_ids) if token in (chosen, twin))
    ids = list(tied.token_ids)
    ids[at] = chosen if ids[at] == twin else twin
    require_same_greedy(model, [prompt], [tied], [replace(tied, token_ids=ids)])


NEW = 40


@pytest.mark.parametrize(("depth", "chance"), [(1, 1.0), (3, 0.0), (3, 0.6)])
def test_acceptance_by_position_and_entropy_equals_that_of_loops(
    monkeypatch: pytest.MonkeyPatch, depth: int, chance: float
) -> None:
    model = small_model(0, depth)
    prompts = random_prompts(0, (3, 5, 9))
    plain = generate(model, prompts, max_new_tokens=NEW, speculative=False)
    texts = [[*p, *g.token_ids] for p, g in zip(prompts, plain, strict=True)]
    steer_drafts(monkeypatch, prompts, ids_of(plain), chance=chance)
    drafted = generate(model, prompts, max_new_tokens=NEW)
    drafts = [first_drafts(g, NEW) for g in drafted]
    for g, places in zip(drafted, drafts, strict=True):
        assert len(places) == g.drafts_reached[0]
        assert sum(accepted for _, accepted in places) == g.drafts_accepted[0]
    values = acceptance_by(model, prompts, drafted, max_new_tokens=NEW)

    position, entropy, taken, of_text = [], [], [], []
    for number, (prompt, text, places) in enumerate(zip(prompts, texts, drafts, strict=True)):
        p_TV = teacher_forced(model, [*text, *[0] * depth], 0)[0].double().softmax(-1)
        for place, accepted in places:
            position.append(len(prompt) + place + 1)
            p_V = p_TV[len(prompt) + place - 1]
            entropy.append(-sum(float(p) * math.log(p) for p in p_V))
            taken.append(accepted)
            of_text.append(number)
    bins = [(f"at_{low}-{2 * low - 1}", position, low, 2 * low) for low in (4, 8, 16, 32)]
    for low, high in ((0, 0.5), (0.5, 1), (1, 2), (2, 4)):
        bins.append((f"entropy_{low}-{high}", entropy, low, high))
    for name, x, low, high in bins:
        inside = [t for v, t in zip(x, taken, strict=True) if low <= v < high]
        if inside:
            assert values[f"acceptance_{name}"] == pytest.approx(sum(inside) / len(inside))
    ones = torch.ones(len(taken), dtype=torch.float64)
    y = torch.tensor(taken, dtype=torch.float64)
    for name, x in (("entropy", entropy), ("position", [math.log2(p) for p in position])):
        table = torch.stack((ones, torch.tensor(x, dtype=torch.float64)), 1)
        line = torch.linalg.lstsq(table, y.unsqueeze(1)).solution
        assert values[f"acceptance_slope_{name}"] == pytest.approx(float(line[1]), abs=1e-5)
        # The sandwich estimator of Liang & Zeger 1986, clustered by text, with G / (G - 1).
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


def test_one_text_has_a_slope_and_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = small_model(0, 1), random_prompts(0, (5,))
    plain = generate(model, prompts, max_new_tokens=NEW, speculative=False)
    steer_drafts(monkeypatch, prompts, ids_of(plain), chance=0.5)
    drafted = generate(model, prompts, max_new_tokens=NEW)
    values = acceptance_by(model, prompts, drafted, max_new_tokens=NEW)
    assert "acceptance_slope_position" in values
    assert "acceptance_slope_position_se" not in values


def test_texts_without_drafts_have_no_acceptance() -> None:
    model, prompts = small_model(0, 0), random_prompts(0, (3,))
    texts = generate(model, prompts, max_new_tokens=1)
    assert acceptance_by(model, prompts, texts, max_new_tokens=1) == {}

"""Compute-equivalent gains of runs on curves for which they are known."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.report.__main__ import report
from sweeps.report.chart import styled
from sweeps.report.equivalent import Gain, PlainCurve, Spent, families
from sweeps.report.figures import gains
from tests.sweeps.fixture_runs import NO_MTP, on_text, write_run
from tests.sweeps.reported import drawings, settings_of, table_of

BUDGETS = (0.3, 0.5, 0.75, 1.0, 1.35)
FULL = 5e12
STEP = 2.5e9


def plain_runs(loss: object, budgets: tuple[float, ...] = BUDGETS) -> list[Spent]:
    """Plain runs at these budgets; ``loss`` is a function of FLOPs."""
    return [Spent(flops=b * FULL, loss=loss(b * FULL), steps=b * FULL / STEP) for b in budgets]


@settings(max_examples=30)
@given(
    floor=st.floats(0.0, 2.0),
    scale=st.floats(0.5, 5.0),
    power=st.floats(0.05, 0.6),
    price=st.floats(0.4, 1.0),
    effect=st.floats(0.31, 1.34),
)
def test_gains_of_a_power_law_are_exact_within_one_percent(floor, scale, power, price, effect):
    def loss(flops: float) -> float:
        return floor + scale * (flops / FULL) ** -power

    # The steps of the full plain run, each of 1 / price plain FLOPs and worth `effect` plain steps.
    run = Spent(flops=FULL / price, loss=loss(effect * FULL), steps=FULL / STEP)
    gain = PlainCurve(plain_runs(loss)).gain(run)
    assert isinstance(gain, Gain)
    assert gain.price == pytest.approx(price, rel=1e-12)
    assert gain.effect == pytest.approx(effect, rel=0.01)
    assert gain.total == pytest.approx(price * effect, rel=0.01)


def test_losses_outside_the_plain_curve_have_no_gain():
    curve = PlainCurve(plain_runs(lambda flops: 2 + FULL / flops))
    best, worst = curve.runs[-1].loss, curve.runs[0].loss
    assert curve.flops_at(best) == pytest.approx(1.35 * FULL)
    assert curve.flops_at(worst) == pytest.approx(0.3 * FULL)
    assert curve.flops_at(math.nextafter(best, 0)) is None
    assert curve.flops_at(math.nextafter(worst, 9)) is None
    why = curve.gain(Spent(flops=FULL, loss=worst + 0.1, steps=FULL / STEP))
    assert isinstance(why, str) and why.startswith("out of range: its loss of 5.4333 is not")


def test_a_curve_that_does_not_fall_is_refused():
    runs = plain_runs(lambda flops: 2.0 if flops > 0.9 * FULL else 1.9 + 0.1 * FULL / flops)
    with pytest.raises(ValueError, match="did not always make"):
        PlainCurve(runs)
    with pytest.raises(ValueError, match="at least two lengths"):
        PlainCurve(runs[:1])


def test_of_plain_runs_of_equal_flops_the_lower_loss_counts():
    runs = plain_runs(lambda flops: 2 + FULL / flops)
    worse = [Spent(run.flops, run.loss + 0.01, run.steps) for run in runs]
    assert PlainCurve([*worse, *runs, runs[-1]]).runs == runs


# In a report.

PRICE, EFFECTS = 0.8, {"sequential": 0.9, "parallel": 1.1, "beyond": 2.0}
NOISE = (0.99, 1.0, 1.01)


def law(flops: float, seed: int) -> float:
    return 1 + 0.02 * seed + 0.7 * (flops / FULL) ** -0.2


def priced_sweep(folder: Path, *, seeds: int = 3, budgets: tuple[float, ...] = BUDGETS) -> None:
    """Plain runs by :func:`law` at several budgets, and an arm for each of EFFECTS."""
    steps = FULL / STEP

    def run(name: str, seed: int, loss: float, flops: float, length: float, **config: Any) -> None:
        summary = {"flops": flops, "step": round(length), **on_text("a" * 32)}
        config = {"seed": seed, "trainer.max_steps": round(length), **config}
        write_run(folder / f"{name}-{seed}", config, loss=loss, summary=summary)

    for seed in range(seeds):
        for budget in budgets:
            flops = budget * FULL
            run(f"none_{budget}", seed, law(flops, seed), flops, budget * steps, **NO_MTP)
        for head, effect in EFFECTS.items():
            config = {"mtp._target_": f"mtp_lightning.mtp.{head}.Config"}
            config |= {"mtp.stride": 2, "data.stride": 2}
            loss = law(effect * NOISE[seed] * FULL, seed)
            run(head, seed, loss, FULL / PRICE, steps, **config)


def test_gains_in_a_report_are_exact_within_one_percent(tmp_path: Path) -> None:
    priced_sweep(tmp_path)
    settings = settings_of(tmp_path)
    (family,) = families(settings)
    assert len(family.plain) == 5
    arms = {arm.setting.config["mtp._target_"].split(".")[2]: arm for arm in family.arms}
    mean = math.exp(math.fsum(map(math.log, NOISE)) / 3)
    for head in ("sequential", "parallel"):
        arm = arms[head]
        assert arm.total and arm.price and arm.effect and not arm.why
        assert arm.price.mean == pytest.approx(PRICE)
        assert arm.effect.mean == pytest.approx(EFFECTS[head] * mean, rel=0.01)
        assert arm.total.mean == pytest.approx(PRICE * EFFECTS[head] * mean, rel=0.01)
        # By hand: t of two degrees of freedom on the logarithms of the noise.
        logs = [math.log(n) for n in NOISE]
        spread = math.sqrt(math.fsum((x - sum(logs) / 3) ** 2 for x in logs) / 2 / 3)
        low, high = arm.total.ends
        assert math.log(high / low) == pytest.approx(2 * 4.30265 * spread, rel=0.05)
    beyond = arms["beyond"]
    assert beyond.total is None and "seed 0: out of range: its loss of" in beyond.why
    with styled():
        drawing = gains(settings, family)
    (axes,) = drawing.chart.panels
    assert axes.get_xscale() == "log" and "lower is better" in axes.get_ylabel()
    assert axes.get_xlabel() == "training FLOPs"
    labels = {text.get_text() for text in axes.texts}
    assert {"0.72 ×", "0.88 ×"} <= labels and len(labels - {""}) == 2
    arrows = [text for text in axes.texts if text.get_text() == ""]
    for arrow in arrows:  # horizontal, from the arm's FLOPs to those of plain training
        (end, height), (start, level) = arrow.xy, arrow.xyann
        assert height == level and start == pytest.approx(FULL / PRICE)
        assert min(abs(end / start / gain - 1) for gain in (0.72, 0.88)) < 0.01


def test_the_order_of_config_keys_does_not_change_families(tmp_path: Path) -> None:
    priced_sweep(tmp_path, seeds=1)
    settings = settings_of(tmp_path)
    for setting in settings.all[::2]:
        setting.config = {"optimizer.lr": 0.1, **setting.config}
    for setting in settings.all[1::2]:
        setting.config = {**setting.config, "optimizer.lr": 0.1}
    (family,) = families(settings)
    assert len(family.plain) == 5 and len(family.arms) == 3


def test_every_text_has_a_family_of_its_own(tmp_path: Path) -> None:
    priced_sweep(tmp_path, seeds=1)
    settings = settings_of(tmp_path)
    first = next(s for s in settings.all if s.is_plain)
    first.done[0].summary |= on_text("b" * 32)
    (family,) = families(settings_of(tmp_path))
    assert len(family.plain) == 5
    (family,) = families(settings)
    assert first not in family.plain and len(family.plain) == 4 and len(family.arms) == 3


def test_an_arm_matched_to_fewer_layers_leaves_the_family(tmp_path: Path) -> None:
    """Matching parameters removes layers, which only the summary has."""
    priced_sweep(tmp_path, seeds=1)
    settings = settings_of(tmp_path)
    before = {arm.setting.label for family in families(settings) for arm in family.arms}
    *_, smaller = (s for s in settings.all if s.label in before)
    smaller.done[0].summary["compare"] = {"n_layers": 3}
    after = {arm.setting.label for family in families(settings) for arm in family.arms}
    assert after == before - {smaller.label}


def test_the_page_has_a_table_and_a_sentence_of_gains(tmp_path: Path) -> None:
    priced_sweep(tmp_path)
    path, sentences, _ = report([tmp_path])
    html = path.read_text(encoding="utf-8")
    table = table_of(html, "gains")
    assert re.search(r'0\.720 <span class="half">0\.\d+ to 0\.\d+</span>', table)
    assert "0.800" in table and "out of range: its loss of" in table
    assert 'id="figure-gains"' in html and (tmp_path / "figures" / "gains.svg").exists()
    (sentence,) = [
        text for text in sentences if "sequential modules" in text and "Plain training" in text
    ]
    assert "needs 0.72 times the FLOPs of" in sentence
    assert "a price of 0.80 times an effect of 0.90" in sentence


def test_without_a_plain_curve_the_report_names_what_is_missing(tmp_path: Path) -> None:
    priced_sweep(tmp_path, budgets=(1.0,))
    assert families(settings_of(tmp_path)) == []
    why = drawings(tmp_path)["gains"].why
    assert why == "no plain runs (mtp=none) of two lengths and an arm to compare"


def test_a_plain_curve_has_only_comparable_runs_of_its_seed(tmp_path: Path) -> None:
    priced_sweep(tmp_path / "a")
    for run in (tmp_path / "a").glob("none_*-2"):
        (run / "summary.json").unlink()
    (family,) = families(settings_of(tmp_path / "a"))
    assert {arm.why for arm in family.arms if "out of range" not in arm.why} == {
        "seed 2: a plain curve needs runs of at least two lengths"
    }
    # Runs of a constant learning rate or another size are on no arm's curve.
    priced_sweep(tmp_path / "b", budgets=(0.3, 1.35))
    other = {"model.d_model": 64, **NO_MTP}
    constant = {"optimizer.schedule.kind": "constant", **NO_MTP}
    for name, config in (("small", other), ("constant", constant)):
        write_run(tmp_path / "b" / name, {"trainer.max_steps": 700, **config}, loss=9.0)
    # Nor are lengths at which a run stopped early.
    stopped = {"trainer.max_steps": 900, **NO_MTP}
    early = {"stopped_early": True, "step": 800, "flops": 2e12, **on_text("a" * 32)}
    write_run(tmp_path / "b" / "stopped", stopped, loss=2.0, summary=early)
    (family,) = families(settings_of(tmp_path / "b"))
    assert len(family.plain) == 2


def test_an_arm_that_stopped_early_has_no_gain(tmp_path: Path) -> None:
    priced_sweep(tmp_path)
    summary = tmp_path / "sequential-1" / "summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "stopped_early": True}))
    (family,) = families(settings_of(tmp_path))
    stopped = {arm.total is None for arm in family.arms if "seed 1: it stopped early" in arm.why}
    assert stopped == {True}


def test_a_length_that_a_seed_has_not_finished_is_on_no_seeds_curve(tmp_path: Path) -> None:
    priced_sweep(tmp_path / "a")
    (tmp_path / "a" / f"none_{BUDGETS[2]}-1" / "summary.json").unlink()
    priced_sweep(tmp_path / "b", budgets=(*BUDGETS[:2], *BUDGETS[3:]))
    totals = [
        [arm.total and arm.total.mean for arm in family.arms]
        for folder in "ab"
        for family in families(settings_of(tmp_path / folder))
    ]
    assert totals[0] == totals[1]


def test_gain_is_price_times_effect_if_prices_differ_by_seed(tmp_path: Path) -> None:
    """As with ``balance=sampled_depths``, whose random draws change the cost of a step."""
    priced_sweep(tmp_path)
    for seed, factor in enumerate((1.0, 1.5, 3.0)):
        summary = tmp_path / f"sequential-{seed}" / "summary.json"
        content = json.loads(summary.read_text("utf-8"))
        summary.write_text(json.dumps({**content, "flops": factor * content["flops"]}))
    (family,) = families(settings_of(tmp_path))
    (arm,) = (arm for arm in family.arms if "sequential" in arm.setting.label)
    assert arm.price.mean == pytest.approx(PRICE / 4.5 ** (1 / 3))
    assert arm.total.mean == pytest.approx(arm.price.mean * arm.effect.mean)

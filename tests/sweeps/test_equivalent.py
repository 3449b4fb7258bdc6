"""Compute-equivalent gains are recovered from curves on which they are known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeps.report.equivalent import PlainCurve, Spent

pytest.importorskip("scipy", reason="extra 'report' is not installed")

BUDGETS = (0.3, 0.5, 0.75, 1.0, 1.35)
FULL = 5e12
STEP = 2.5e9


def plain_runs(loss: object, budgets: tuple[float, ...] = BUDGETS) -> list[Spent]:
    """Plain runs at the budgets, of a loss as a function of FLOPs."""
    return [
        Spent(flops=b * FULL, loss=loss(b * FULL), steps=b * FULL / STEP)  # type: ignore[operator]
        for b in budgets
    ]


@given(
    floor=st.floats(0.0, 2.0),
    scale=st.floats(0.5, 5.0),
    power=st.floats(0.05, 0.6),
    price=st.floats(0.4, 1.0),
    effect=st.floats(0.31, 1.34),
)
def test_a_power_law_gives_the_gain_back_within_one_percent(floor, scale, power, price, effect):
    def loss(flops: float) -> float:
        return floor + scale * (flops / FULL) ** -power

    # As many steps as the full plain run, each at its price, worth `effect` plain steps.
    run = Spent(flops=FULL / price, loss=loss(effect * FULL), steps=FULL / STEP)
    found = PlainCurve(plain_runs(loss)).gain(run)
    assert found is not None
    assert found.price == pytest.approx(price, rel=1e-12)
    assert found.effect == pytest.approx(effect, rel=0.01)
    assert found.total == pytest.approx(price * effect, rel=0.01)


def test_plain_runs_gain_nothing_and_lose_nothing():
    runs = plain_runs(lambda flops: 3 - 0.4 * math.log(flops / FULL))
    curve = PlainCurve(runs[::-1])
    for run in runs:
        found = curve.gain(run)
        assert found is not None
        assert found.total == pytest.approx(1) and found.price == found.effect / found.total == 1


def test_nothing_is_extrapolated():
    curve = PlainCurve(plain_runs(lambda flops: 2 + FULL / flops))
    best, worst = curve.runs[-1].loss, curve.runs[0].loss
    assert curve.flops_at(best) == pytest.approx(1.35 * FULL)
    assert curve.flops_at(worst) == pytest.approx(0.3 * FULL)
    assert curve.flops_at(math.nextafter(best, 0)) is None
    assert curve.flops_at(math.nextafter(worst, 9)) is None
    assert curve.gain(Spent(flops=FULL, loss=worst + 0.1, steps=FULL / STEP)) is None


def test_a_curve_that_does_not_fall_is_refused():
    runs = plain_runs(lambda flops: 2.0 if flops > 0.9 * FULL else 1.9 + 0.1 * FULL / flops)
    with pytest.raises(ValueError, match="did not always make"):
        PlainCurve(runs)
    with pytest.raises(ValueError, match="at least two lengths"):
        PlainCurve(runs[:1])

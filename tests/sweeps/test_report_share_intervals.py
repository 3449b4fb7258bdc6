"""Intervals of shares over seeds: Wilson's equation solved numerically, and what is shown."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("scipy")

from scipy import optimize, stats

from sweeps.report.__main__ import report
from sweeps.report.metrics import ANSWERS, OF_TASKS, TABLE, is_share
from sweeps.report.statistics import Interval, interval, share_interval
from tests.sweeps.fixture_runs import write_run


def solved(values: list[float]) -> tuple[float, float]:
    """The two roots of ``(m - mu)^2 = t^2 phi mu (1 - mu) / n``, one on each side of m."""
    n, mean = len(values), math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    phi = variance / (mean * (1 - mean))
    t = stats.t.ppf(0.975, n - 1)

    def beyond(mu: float) -> float:
        return float((mean - mu) ** 2 - t**2 * phi * mu * (1 - mu) / n)

    return tuple(optimize.brentq(beyond, mean, end, xtol=1e-14) for end in (0.0, 1.0))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "values",
    [
        [0.97, 0.99, 1.0],
        [0.0, 1.0],
        [0.5, 0.52, 0.47, 0.51],
        [1e-6, 0.0, 2e-6],
    ],
)
def test_the_ends_solve_the_equation(values: list[float]) -> None:
    found = share_interval(values)
    assert found.ends == pytest.approx(solved(values), abs=1e-11, rel=1e-7)
    assert found.mean == interval(values).mean and found.n == len(values)
    assert found.half is not None and 2 * found.half == pytest.approx(
        found.ends[1] - found.ends[0]  # type: ignore[index]
    )


def test_it_stays_within_0_and_1() -> None:
    """Where the t interval does not; error bars have no negative length."""
    draw = random.Random(0)
    outside = 0
    for _ in range(1000):
        n, power = draw.randint(2, 6), draw.choice([1, 8, 60, 400])
        values = [draw.random() ** power for _ in range(n)]
        if draw.random() < 0.5:
            values = [1 - value for value in values]
        found, plain = share_interval(values), interval(values)
        below, above = found.reach
        assert below >= 0 and above >= 0
        if found.ends is not None:
            assert 0 <= found.ends[0] <= found.mean <= found.ends[1] <= 1, values
        assert plain.half is not None
        outside += not (plain.half <= plain.mean <= 1 - plain.half)
    assert outside > 200


def test_near_one_half_it_is_the_t_interval_to_second_order() -> None:
    for middle in (0.5, 0.48):
        differences = []
        for size in (1e-2, 1e-3, 1e-4):
            values = [middle - size, middle, middle + 1.5 * size]
            half = interval(values).half
            assert half is not None
            reach = share_interval(values).reach
            differences.append(max(abs(side - half) for side in reach))
            assert differences[-1] < half**2
        assert differences[1] < differences[0] / 90 and differences[2] < differences[1] / 90


def test_without_noise_it_is_a_point() -> None:
    for value in (0.0, 0.25, 1.0):
        assert share_interval([value] * 3) == Interval(value, 0.0, 3)
    assert share_interval([0.9]) == Interval(0.9, None, 1)
    assert share_interval([1.0, math.nextafter(1.0, 0.0)]).mean == 1.0


def test_what_is_shown_in_percent_is_a_share() -> None:
    for metric in (*TABLE, ANSWERS, *OF_TASKS):
        assert is_share(metric.tag) == (metric.form == "%"), metric.tag
    shares = ["val/longer/exact_match", "val/forced_accuracy_position_17-32", "val/overlap_depth_2"]
    shares += ["decode/acceptance_entropy_4-up", "decode/acceptance_at_8-15"]
    assert all(map(is_share, shares))
    assert not any(map(is_share, ["val/context_gain_8", "decode/tokens_per_step", "accuracy"]))


def test_the_report_shows_its_ends(tmp_path: Path) -> None:
    """In the table, as bars of the figures, and under the pointer."""
    values = [0.97, 0.99, 1.0]
    for seed, value in enumerate(values):
        summary = {"val/agreement_depth_1": value, "val/loss_depth_1": 2.5}
        write_run(tmp_path / f"s{seed}", {"seed": seed}, loss=2.0 + seed / 10, summary=summary)
    page = report([tmp_path])[0].read_text(encoding="utf-8")
    low, high = solved(values)
    assert f'98.7 % <span class="half">{100 * low:.1f} % to {100 * high:.1f} %</span>' in page
    assert re.search(r'2\.1000 <span class="half">± 0\.\d+</span>', page)  # the loss keeps its own
    assert f"tokens: 0.98667 ({low:.5g} to {high:.5g})</title>" in page
    assert re.search(r"nats per token: 2\.1 ± 0\.\d+</title>", page)


def test_a_share_by_name_alone_keeps_its_t_interval(tmp_path: Path) -> None:
    """A user's own metric, of 0 .. 100."""
    for seed, value in enumerate((97.0, 99.0)):
        write_run(tmp_path / f"s{seed}", {"seed": seed}, summary={"val/agreement_depth_1": value})
    page = report([tmp_path])[0].read_text(encoding="utf-8")
    assert re.search(r'9800\.0 % <span class="half">± \d+', page)

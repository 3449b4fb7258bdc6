"""Statistics of small samples against numbers by hand, closed forms and brute force."""

from __future__ import annotations

import math
import random
import re
from fractions import Fraction
from math import comb
from pathlib import Path

import pytest
from scipy import optimize, stats

from sweeps.report.metrics import ANSWERS, OF_TASKS, TABLE, is_share
from sweeps.report.statistics import (
    Interval,
    Wait,
    holm,
    interval,
    paired,
    share,
    share_interval,
    survival,
    unpaired,
)
from tests.sweeps.fixture_runs import write_run
from tests.sweeps.reported import cells, page_of


def test_one_pair_or_a_constant_difference_has_no_p_value() -> None:
    assert paired({0: 1.0}, {1: 1.0}) is None
    alone = paired({0: 1.0}, {0: 3.0})
    assert alone.p is None and alone.difference == Interval(-2.0, None, 1)
    same = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert same.p is None and same.constant
    shifted = paired({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0})
    assert shifted.p is None and shifted.constant
    # 0.3 - 0.2 and 1.1 - 1.0 differ in the last bits, by what a subtraction rounds away.
    rounded = paired({0: 0.3, 1: 1.1}, {0: 0.2, 1: 1.0})
    assert rounded.p is None and rounded.constant
    near = paired({0: 0.3, 1: 1.1 + 1e-9}, {0: 0.2, 1: 1.0})
    assert near.p is not None and not near.constant


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06, and 0.04 raised to 0.06."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


# Shares of seeds, Fisher's test and survival curves.


def at_least(count: int, n: int, p: float) -> float:
    """Chance of ``count`` or more of n."""
    return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count, n + 1))


@pytest.mark.parametrize("n", [1, 3, 5, 20])
def test_clopper_pearson_ends_where_the_tails_are_two_and_a_half_percent(n: int) -> None:
    for count in range(n + 1):
        estimate = share(count, n)
        assert estimate.rate == count / n
        assert 0 <= estimate.low <= estimate.rate <= estimate.high <= 1
        if count > 0:
            assert at_least(count, n, estimate.low) == pytest.approx(0.025, rel=1e-6)
        if count < n:
            assert 1 - at_least(count + 1, n, estimate.high) == pytest.approx(0.025, rel=1e-6)
    assert (share(0, n).low, share(n, n).high) == (0.0, 1.0)


def fisher(a: int, n_a: int, b: int, n_b: int) -> float:
    """Sum over all tables of these margins that are at most as likely as the one seen."""
    total = a + b
    ways = {k: comb(n_a, k) * comb(n_b, total - k) for k in range(total + 1)}
    observed = ways[a]
    return float(Fraction(sum(w for w in ways.values() if w <= observed), comb(n_a + n_b, total)))


def test_fisher_is_the_sum_over_tables() -> None:
    for n_a, n_b in ((2, 2), (5, 5), (3, 7)):
        for a in range(n_a + 1):
            for b in range(n_b + 1):
                test = unpaired(share(a, n_a), share(b, n_b))
                assert test.p == pytest.approx(fisher(a, n_a, b, n_b), rel=1e-6)
                assert test.least == pytest.approx(fisher(n_a, n_a, 0, n_b), rel=1e-6)
                assert test.p >= test.least * (1 - 1e-9)
    # Five of five against none of five: two of the 252 tables are so extreme.
    assert fisher(5, 5, 0, 5) == pytest.approx(2 / 252)
    one_seed = unpaired(share(1, 1), share(0, 20))
    assert (one_seed.p, one_seed.least) == (None, None)


def still_waiting(waits: list[Wait], time: float) -> float:
    """Kaplan-Meier's product, as it is written."""
    left = 1.0
    for t in sorted({w.time for w in waits if w.ended and w.time <= time}):
        watched = sum(w.time >= t for w in waits)
        left *= 1 - sum(w.ended and w.time == t for w in waits) / watched
    return left


def test_survival_is_the_kaplan_meier_product() -> None:
    draw = random.Random(0)
    for n in (1, 2, 5, 20):
        for _ in range(8):
            waits = [Wait(10.0 * draw.randint(1, 6), draw.random() < 0.6) for _ in range(n)]
            curve = survival(waits)
            assert curve.n == n
            assert curve.ended == sum(w.ended for w in waits)
            for time in range(0, 80, 5):
                assert curve.after(time) == pytest.approx(still_waiting(waits, time))
            medians = [t for t in range(0, 80, 5) if still_waiting(waits, t) <= 0.5 + 1e-9]
            assert curve.median == (medians[0] if medians else None)


def test_survival_of_none_and_of_half() -> None:
    assert survival([]) is None
    # 9/10 x 7/9 x 5/7 is half, and one bit more than it in floating point.
    half = survival([Wait(t, True) for t in (3, 4, 4, 5, 5)] + 5 * [Wait(6, False)])
    assert half.shares[2] > 0.5 and half.median == 5


# Intervals of shares over seeds, against Wilson's equation solved numerically.


def wilson(values: list[float]) -> tuple[float, float]:
    """The two roots of ``(m - mu)^2 = t^2 phi mu (1 - mu) / n``, one on each side of m."""
    n, mean = len(values), math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    phi = variance / (mean * (1 - mean))
    t = stats.t.ppf(0.975, n - 1)

    def beyond(mu: float) -> float:
        return float((mean - mu) ** 2 - t**2 * phi * mu * (1 - mu) / n)

    return tuple(optimize.brentq(beyond, mean, end, xtol=1e-14) for end in (0.0, 1.0))


@pytest.mark.parametrize(
    "values", [[0.97, 0.99, 1.0], [0.0, 1.0], [0.5, 0.52, 0.47, 0.51], [1e-6, 0.0, 2e-6]]
)
def test_share_intervals_solve_wilsons_equation(values: list[float]) -> None:
    estimate = share_interval(values)
    assert estimate.ends == pytest.approx(wilson(values), abs=1e-11, rel=1e-7)
    assert estimate.mean == interval(values).mean and estimate.n == len(values)
    assert 2 * estimate.half == pytest.approx(estimate.ends[1] - estimate.ends[0])


def test_share_intervals_stay_within_0_and_1() -> None:
    """Unlike t intervals. Error bars have no negative length."""
    draw = random.Random(0)
    outside = 0
    for _ in range(300):
        n, power = draw.randint(2, 6), draw.choice([1, 8, 60, 400])
        values = [draw.random() ** power for _ in range(n)]
        if draw.random() < 0.5:
            values = [1 - value for value in values]
        estimate, plain = share_interval(values), interval(values)
        below, above = estimate.reach
        assert below >= 0 and above >= 0
        if estimate.ends is not None:
            assert 0 <= estimate.ends[0] <= estimate.mean <= estimate.ends[1] <= 1, values
        outside += not (plain.half <= plain.mean <= 1 - plain.half)
    assert outside > 60


def test_share_intervals_without_noise_are_points() -> None:
    for value in (0.0, 0.25, 1.0):
        assert share_interval([value] * 3) == Interval(value, 0.0, 3)
    assert share_interval([0.9]) == Interval(0.9, None, 1)
    assert share_interval([1.0, math.nextafter(1.0, 0.0)]).mean == 1.0


def test_metrics_in_percent_are_shares() -> None:
    for metric in (*TABLE, ANSWERS, *OF_TASKS):
        assert is_share(metric.tag) == (metric.form == "%"), metric.tag
    shares = ["val/longer/exact_match", "val/forced_accuracy_position_17-32", "val/overlap_depth_2"]
    shares += ["decode/acceptance_entropy_4-up", "decode/acceptance_at_8-15"]
    shares += ["val/rejection_depth_1", "val/recall_16_depth_1", "val/floor_depth_2_order_1"]
    assert all(map(is_share, [*shares, "val/floor_share_depth_2_order_1"]))
    others = ["val/context_gain_8", "val/context_score", "val/gap_depth_1_order_0"]
    assert not any(map(is_share, [*others, "decode/tokens_per_step", "accuracy"]))


def test_the_report_shows_the_ends_of_share_intervals(tmp_path: Path) -> None:
    """In the table and in the titles of points."""
    values = [0.97, 0.99, 1.0]
    for seed, value in enumerate(values):
        summary = {"val/agreement_depth_1": value, "val/loss_depth_1": 2.5}
        write_run(tmp_path / f"s{seed}", {"seed": seed}, loss=2.0 + seed / 10, summary=summary)
    page = page_of(tmp_path)
    low, high = wilson(values)
    assert f'98.7 % <span class="half">{100 * low:.1f} % to {100 * high:.1f} %</span>' in page
    assert re.search(r'2\.1000 <span class="half">± 0\.\d+</span>', page)  # a loss is not a share
    assert f"agreement: 0.98667 ({low:.5g} to {high:.5g})</title>" in page
    assert re.search(r"nats per token: 2\.1 ± 0\.\d+</title>", page)


def test_values_beyond_1_keep_their_t_interval_under_any_name(tmp_path: Path) -> None:
    """A metric of the user from 0 to 100, with the tag of a share."""
    for seed, value in enumerate((97.0, 99.0)):
        write_run(tmp_path / f"s{seed}", {"seed": seed}, summary={"val/agreement_depth_1": value})
    (cell,) = [cell for cell in cells(tmp_path) if cell.text == "9800.0 %"]
    assert cell.half.startswith("±")

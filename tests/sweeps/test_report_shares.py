"""Intervals of shares, Fisher's test and survival curves against closed forms and brute force."""

from __future__ import annotations

import random
from fractions import Fraction
from math import comb

import pytest

pytest.importorskip("scipy")

from sweeps.report.statistics import Wait, share, survival, unpaired


def at_least(count: int, n: int, p: float) -> float:
    """Chance of ``count`` or more of n."""
    return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count, n + 1))


@pytest.mark.parametrize("n", [1, 5, 20])
def test_clopper_pearson_ends_where_the_tails_are_two_and_a_half_percent(n: int) -> None:
    for count in range(n + 1):
        found = share(count, n)
        assert found.rate == count / n and 0 <= found.low <= found.rate <= found.high <= 1
        if count > 0:
            assert at_least(count, n, found.low) == pytest.approx(0.025, rel=1e-6)
        if count < n:
            assert 1 - at_least(count + 1, n, found.high) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize("n", [1, 3, 20])
def test_none_and_all_have_closed_forms(n: int) -> None:
    none, every = share(0, n), share(n, n)
    assert (none.low, every.high) == (0.0, 1.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / n))
    assert every.low == pytest.approx(0.025 ** (1 / n))


def fisher(a: int, n_a: int, b: int, n_b: int) -> float:
    """Sum over all tables of these margins that are no likelier than the one seen."""
    total = a + b
    ways = {k: comb(n_a, k) * comb(n_b, total - k) for k in range(total + 1)}
    seen = ways[a]
    return float(Fraction(sum(w for w in ways.values() if w <= seen), comb(n_a + n_b, total)))


def test_fisher_is_the_sum_over_tables() -> None:
    for n_a, n_b in ((2, 2), (5, 5), (3, 7)):
        for a in range(n_a + 1):
            for b in range(n_b + 1):
                found = unpaired(share(a, n_a), share(b, n_b))
                assert found.p == pytest.approx(fisher(a, n_a, b, n_b), rel=1e-6)
                assert found.least is not None and found.p is not None
                assert found.p >= found.least * (1 - 1e-9)


def test_fisher_by_hand() -> None:
    """Five of five against none of five: two of the 252 tables are so extreme."""
    found = unpaired(share(5, 5), share(0, 5))
    assert found.p == found.least == pytest.approx(2 / 252)
    assert unpaired(share(3, 3), share(0, 3)).least == pytest.approx(2 / 20)  # never below 0.05


def test_one_seed_has_no_test() -> None:
    found = unpaired(share(1, 1), share(0, 20))
    assert (found.p, found.least) == (None, None)


def still_waiting(waits: list[Wait], time: float) -> float:
    """Kaplan-Meier's product, as it is written."""
    left = 1.0
    for t in sorted({w.time for w in waits if w.ended and w.time <= time}):
        watched = sum(w.time >= t for w in waits)
        left *= 1 - sum(w.ended and w.time == t for w in waits) / watched
    return left


def test_survival_is_the_product() -> None:
    draw = random.Random(0)
    for n in (1, 2, 5, 20):
        for _ in range(20):
            waits = [Wait(10.0 * draw.randint(1, 6), draw.random() < 0.6) for _ in range(n)]
            found = survival(waits)
            assert found is not None and found.n == n
            assert found.ended == sum(w.ended for w in waits)
            for time in range(0, 80, 5):
                assert found.after(time) == pytest.approx(still_waiting(waits, time))
            medians = [t for t in range(0, 80, 5) if still_waiting(waits, t) <= 0.5 + 1e-9]
            assert found.median == (medians[0] if medians else None)


def test_survival_by_hand() -> None:
    """Of five, one ends at 10 (4/5 wait); at 20 two of four do, one of them last looked at there
    (4/5 x 2/4)."""
    waits = [Wait(10, True), Wait(20, True), Wait(20, True), Wait(20, False), Wait(30, False)]
    found = survival(waits)
    assert found is not None
    assert (found.times, found.censored, found.median) == ((10, 20, 30), (20, 30), 20)
    assert found.shares == pytest.approx((0.8, 0.4, 0.4))
    assert (found.after(9), found.after(20)) == (1.0, pytest.approx(0.4))


def test_survival_of_none_and_of_all() -> None:
    assert survival([]) is None
    none = survival([Wait(10, False), Wait(20, False)])
    assert none is not None and set(none.shares) == {1.0} and none.median is None
    every = survival([Wait(10, True), Wait(20, True)])
    assert every is not None and every.shares == (0.5, 0.0) and every.median == 10
    # 9/10 x 7/9 x 5/7 is half, and one bit more than it in floating point.
    half = survival([Wait(t, True) for t in (3, 4, 4, 5, 5)] + 5 * [Wait(6, False)])
    assert half is not None and half.shares[2] > 0.5 and half.median == 5

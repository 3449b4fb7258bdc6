"""Statistics of small samples: means over seeds, shares of seeds, times to solve, and tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

CONFIDENCE = 0.95
LEVEL = 0.05  # significance level of the tests


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval: ``mean ± half``, unless it has ends."""

    mean: float  # mean of the values
    # Half of the interval's width; None for a single value, which has no interval.
    half: float | None
    n: int  # number of values
    ends: tuple[float, float] | None = None  # (low, high) of an asymmetric interval, else None

    @property
    def reach(self) -> tuple[float, float]:
        """Distances of the mean to the lower and the upper end; 0 for a single value."""
        if self.ends is None:
            return self.half or 0.0, self.half or 0.0
        return self.mean - self.ends[0], self.ends[1] - self.mean

    @property
    def span(self) -> tuple[float, float]:
        """The lower and the upper end; the value twice for a single one."""
        below, above = self.reach
        return self.mean - below, self.mean + above


def interval(values: Sequence[float]) -> Interval:
    """Mean of values, one per seed, and Student's t interval, ``t s / sqrt(n)`` of n - 1."""
    assert values and all(math.isfinite(value) for value in values)
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Interval(mean, None, n)
    return Interval(mean, t_quantile(n) * _standard_error(values, mean), n)


def t_quantile(n: int) -> float:
    """Student's t of the 95 % interval of n values, n - 1 degrees of freedom."""
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))


def share_interval(values: Sequence[float]) -> Interval:
    """Mean m of shares with an interval within 0 .. 1: Wilson's (1927) score interval with the
    dispersion phi estimated from the values (quasi-binomial; McCullagh and Nelder 1989, section
    4.5). It contains every mu with

        |m - mu| <= t_{n-1} sqrt(phi mu (1 - mu) / n),    phi = s^2 / (m (1 - m))

    At m = 1/2 it equals the t interval up to second order in its width. Equal values give a point,
    as with the t interval.
    """
    assert all(0 <= value <= 1 for value in values)
    t_interval = interval(values)
    mean, rest = t_interval.mean, 1 - t_interval.mean
    if not t_interval.half or not mean * rest:
        return t_interval
    # The roots of (1 + k) mu^2 - (2 m + k) mu + m^2 with k = t^2 phi / n, as distances from m.
    # In this form rounding makes them neither negative nor larger than m and 1 - m.
    k = t_interval.half**2 / (mean * rest)
    reach = k / 2 + math.hypot(k / 2, t_interval.half)
    low, high = mean - mean * (reach / (mean + reach)), mean + rest * (reach / (rest + reach))
    return Interval(mean, (high - low) / 2, t_interval.n, (low, high))


def ratio_interval(values: Sequence[float]) -> Interval:
    """Geometric mean of ratios, all above 0, with the t interval of their logarithms."""
    logs = interval([math.log(value) for value in values])
    mean = math.exp(logs.mean)
    if logs.half is None:
        return Interval(mean, None, logs.n)
    low, high = math.exp(logs.mean - logs.half), math.exp(logs.mean + logs.half)
    return Interval(mean, (high - low) / 2, logs.n, (low, high))


@dataclass(frozen=True)
class Paired:
    """The differences between two settings, seed by seed."""

    difference: Interval  # interval of `setting - reference` over the seeds that both have
    # Two-sided p-value of the paired t-test; None with fewer than two pairs or without noise.
    p: float | None
    # Several seeds all have the same difference up to rounding: a fact about this data, which needs
    # no test.
    constant: bool = False


def paired(setting: Mapping[Any, float], reference: Mapping[Any, float]) -> Paired | None:
    """The paired t-test (Student 1908) of values by seed; None without a common seed."""
    from scipy import stats

    seeds = sorted(setting.keys() & reference.keys(), key=str)
    if not seeds:
        return None
    differences = [setting[seed] - reference[seed] for seed in seeds]
    difference = interval(differences)
    if difference.n < 2:
        return Paired(difference, None)
    # Rounding of the subtraction is not noise between seeds.
    bit = max(math.ulp(values[seed]) for values in (setting, reference) for seed in seeds)
    if max(differences) - min(differences) <= bit:
        return Paired(difference, None, constant=True)
    error = _standard_error(differences, difference.mean)
    return Paired(difference, float(2 * stats.t.sf(abs(difference.mean) / error, difference.n - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the given order. Compared with a level, they keep the
    probability of any false positive among the tests below that level."""
    n = len(p_values)
    order = sorted(range(n), key=p_values.__getitem__)
    raised = (min(1.0, (n - rank) * p_values[i]) for rank, i in enumerate(order))
    adjusted = dict(zip(order, accumulate(raised, max), strict=True))
    return [adjusted[i] for i in range(n)]


def _standard_error(values: Sequence[float], mean: float) -> float:
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


@dataclass(frozen=True)
class Share:
    """``count`` of n seeds, with the 95 % interval of Clopper and Pearson (1934), whose coverage is
    at least 95 % for every true share."""

    count: int  # number of seeds with the property
    n: int  # number of all seeds, at least one
    low: float  # the interval's lower end, 0 .. 1
    high: float  # its upper end, 0 .. 1

    @property
    def rate(self) -> float:
        return self.count / self.n

    @property
    def interval(self) -> Interval:
        return Interval(self.rate, (self.high - self.low) / 2, self.n, (self.low, self.high))


def share(count: int, n: int) -> Share:
    from scipy import stats

    assert 0 <= count <= n and n >= 1
    ends = stats.binomtest(count, n).proportion_ci(CONFIDENCE, "exact")
    return Share(count, n, float(ends.low), float(ends.high))


@dataclass(frozen=True)
class Unpaired:
    """Two shares of seeds, compared without pairing equal seeds."""

    own: Share  # the setting's share
    other: Share  # the reference's share
    p: float | None  # two-sided p-value of Fisher's exact test; None if either has only one seed
    least: float | None  # the smallest p-value that these numbers of seeds can give; None if p is


def unpaired(own: Share, other: Share) -> Unpaired:
    """Fisher's (1935) exact test on the counts of two settings."""
    if min(own.n, other.n) < 2:
        return Unpaired(own, other, None, None)
    least = _fisher(own.n, own.n, 0, other.n)
    return Unpaired(own, other, _fisher(own.count, own.n, other.count, other.n), least)


def _fisher(a: int, n_a: int, b: int, n_b: int) -> float:
    from scipy import stats

    return float(stats.fisher_exact([[a, n_a - a], [b, n_b - b]]).pvalue)


class Wait(NamedTuple):
    """One seed's time until something happens."""

    time: float  # when it happened, or when it was last checked and had not happened
    ended: bool  # whether it happened; otherwise the time is right-censored


@dataclass(frozen=True)
class Survival:
    """The Kaplan-Meier (1958) estimate of the share of seeds that still wait: ``prod over t_i <= t
    of 1 - d_i / n_i``, where d_i seeds ended at t_i and n_i were observed until then."""

    times: tuple[float, ...]  # times at which seeds ended or were last checked, rising
    shares: tuple[float, ...]  # the share that waits after each time; 1 before the first
    censored: tuple[float, ...]  # the last times of seeds that did not end, rising
    ended: int  # number of seeds that ended
    n: int  # number of all seeds

    @property
    def median(self) -> float | None:
        """The first time after which at most half wait; None if more than half wait to the end."""
        # The tolerance covers rounding in the product when exactly half wait.
        times = [t for t, s in zip(self.times, self.shares, strict=True) if s <= 0.5 + 1e-9]
        return times[0] if times else None

    def after(self, time: float) -> float:
        """The share that waits after a time."""
        shares = [s for t, s in zip(self.times, self.shares, strict=True) if t <= time]
        return shares[-1] if shares else 1.0


def survival(waits: Sequence[Wait]) -> Survival | None:
    """The estimate from all seeds' waits; None without any. A seed that was last checked when
    another ended still counts as observed at that time."""
    from scipy import stats

    if not waits:
        return None
    ended = [wait.time for wait in waits if wait.ended]
    censored = sorted(wait.time for wait in waits if not wait.ended)
    curve = stats.ecdf(stats.CensoredData(uncensored=ended, right=censored)).sf
    return Survival(
        tuple(curve.quantiles.tolist()),
        tuple(curve.probabilities.tolist()),
        tuple(censored),
        len(ended),
        len(waits),
    )

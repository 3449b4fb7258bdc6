"""Means over seeds, and whether two settings differ: small samples, Student's t."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval, ``mean - half .. mean + half`` unless it has ends.

    Attributes:
        mean: of the values.
        half: half of the interval's width; None for a single value, which has no interval.
        n: number of values.
        ends: low and high, where these are not equally far from the mean; None elsewhere.
    """

    mean: float
    half: float | None
    n: int
    ends: tuple[float, float] | None = None

    @property
    def reach(self) -> tuple[float, float]:
        """How far it reaches below the mean, and above; 0 for a single value."""
        if self.ends is None:
            return self.half or 0.0, self.half or 0.0
        return self.mean - self.ends[0], self.ends[1] - self.mean


@dataclass(frozen=True)
class Paired:
    """The differences between two settings, seed by seed.

    Attributes:
        difference: interval of ``setting - reference`` over the seeds that both have.
        p: two-sided p-value of the paired t-test; None with fewer than two pairs, and where there
            is nothing to estimate noise from.
        constant: the difference is the same at every one of several seeds, to the last bit: a fact
            about this data, which has no test.
    """

    difference: Interval
    p: float | None
    constant: bool = False


def interval(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval, ``t_{n-1} s / sqrt(n)`` with s over n - 1.

    Args:
        values: one a seed, at least one, all finite.
    """
    from scipy import stats

    assert values and all(math.isfinite(value) for value in values)
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Interval(mean, None, n)
    error = _standard_error(values, mean)
    return Interval(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error, n)


def share_interval(values: Sequence[float]) -> Interval:
    """Mean m of shares and an interval that stays in 0 .. 1: Wilson's (1927) score interval with
    the dispersion phi that the values have (quasi-binomial; McCullagh and Nelder 1989, section
    4.5). It holds every mu with

        |m - mu| <= t_{n-1} sqrt(phi mu (1 - mu) / n),    phi = s^2 / (m (1 - m))

    and is the t interval up to terms of second order in its width, around m = 1/2. Equal values
    have a point, as there.

    Args:
        values: one a seed, at least one, all in 0 .. 1.
    """
    assert all(0 <= value <= 1 for value in values)
    found = interval(values)
    mean, rest = found.mean, 1 - found.mean
    if not found.half or not mean * rest:
        return found
    # The roots of (1 + k) mu^2 - (2 m + k) mu + m^2 with k = t^2 phi / n, as distances from m that
    # no rounding makes negative or larger than m and 1 - m.
    k = found.half**2 / (mean * rest)
    away = k / 2 + math.hypot(k / 2, found.half)
    low, high = mean - mean * (away / (mean + away)), mean + rest * (away / (rest + away))
    return Interval(mean, (high - low) / 2, found.n, (low, high))


def paired(setting: Mapping[Any, float], reference: Mapping[Any, float]) -> Paired | None:
    """The paired t-test over seeds (Student 1908); None without a common seed.

    Args:
        setting: one setting's values by seed, all finite.
        reference: the other's.
    """
    from scipy import stats

    seeds = sorted(setting.keys() & reference.keys(), key=str)
    if not seeds:
        return None
    differences = [setting[seed] - reference[seed] for seed in seeds]
    found = interval(differences)
    if found.n < 2:
        return Paired(found, None)
    # What the subtraction rounded away is no noise between seeds.
    bit = max(math.ulp(values[seed]) for values in (setting, reference) for seed in seeds)
    if max(differences) - min(differences) <= bit:
        return Paired(found, None, constant=True)
    error = _standard_error(differences, found.mean)
    return Paired(found, float(2 * stats.t.sf(abs(found.mean) / error, found.n - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: the chance that any of the tests finds
    a difference where there is none stays below the level that they are compared with."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _standard_error(values: Sequence[float], mean: float) -> float:
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))

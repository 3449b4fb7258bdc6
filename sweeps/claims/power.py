"""Estimates from the observed noise how many seeds would decide an undecided prediction."""

from __future__ import annotations

import math
from statistics import NormalDist

from sweeps.claims.claim import Stored
from sweeps.claims.decide import FEW, NOISE, UNCORRECTED, UNDECIDED, boundary
from sweeps.report.statistics import LEVEL, t_quantile

POWER = 0.8
MOST = 10_000  # above it, the effect counts as equal to the threshold


def seeds_needed(entries: list[Stored], minimum: int) -> list[int | None]:
    """The seeds per arm that would decide each prediction in 80 % of cases.

    The observed effect and variance are taken as true, on the scale of the verdict's test:
    paired differences, an arm's values, logarithms of gains, or shares of seeds. With d the
    effect's distance from the boundary, s the standard deviation, and
    a = 0.05 / (1 + predictions of the claim with a larger p), n is for a t-test the smallest number
    with

        P(T > t(1 - a / 2, n - 1)) >= power,  T noncentral t with n - 1 degrees and d sqrt(n) / s,

    and for shares, by the normal approximation,

        n >= (z(1 - a / 2) + z(power))^2 s^2 / d^2

    where s^2 = p (1 - p) + q (1 - q) for two shares p and q, each with one success and one failure
    added.

    Returns:
        One number per prediction, at least the claim's ``minimum``. None where it is decided
        already, or where more seeds would not help: the arms cannot be compared, a seed has failed,
        the noise is unknown (fewer than three seeds), or the effect is at the threshold.
    """
    # A prediction that more seeds cannot decide never counts in the correction.
    counts = [entry["p"] is not None and (not entry["why"] or _is_open(entry)) for entry in entries]
    ps = [entry["p"] if counted else 1.0 for entry, counted in zip(entries, counts, strict=True)]
    return [
        _enough(entry, minimum, 1 + sum(p > own_p for p in ps))
        for entry, own_p in zip(entries, ps, strict=True)
    ]


def _is_open(entry: Stored) -> bool:
    """Whether more seeds could decide a prediction."""
    return bool(entry["why"].startswith((FEW, NOISE, UNCORRECTED)))


def _enough(entry: Stored, minimum: int, tests: int) -> int | None:
    if entry["verdict"] != UNDECIDED or not _is_open(entry):
        return None
    estimate = None if entry["effect"] is None else _distance_and_variance(entry)
    if estimate is None or not all(estimate):  # no distance, or no noise
        return None
    distance, variance = abs(estimate[0]), estimate[1]
    normal, level = NormalDist(), LEVEL / tests
    z = normal.inv_cdf(1 - level / 2) + normal.inv_cdf(POWER)
    n = max(math.ceil(z**2 * variance / distance**2), minimum, entry["n"] + 1)
    if entry["own"] is None:
        while n <= MOST and _power(n, distance / math.sqrt(variance), level) < POWER:
            n += 1
    return n if n <= MOST else None


def _power(n: int, distance: float, level: float) -> float:
    """The chance that a two-sided t-test of n values is decided on the side of their mean, which
    lies ``distance`` standard deviations from the boundary."""
    from scipy import stats

    critical = stats.t.isf(level / 2, n - 1)
    return float(stats.nct.sf(critical, n - 1, distance * math.sqrt(n)))


def _distance_and_variance(entry: Stored) -> tuple[float, float] | None:
    """The effect's distance from the boundary and one seed's variance, on the test's scale."""
    effect, n = entry["effect"], entry["n"]
    if entry["own"] is not None:
        shares = [share for share in (entry["own"], entry["other"]) if share is not None]
        rates = [(share["count"] + 1) / (share["n"] + 2) for share in shares]
        bound = 0.0 if len(shares) > 1 else boundary(entry["side"], entry["by"], effect)
        return effect - bound, math.fsum(rate * (1 - rate) for rate in rates)
    if entry["low"] is None or n < 3:
        return None
    low, high = entry["low"], entry["high"]
    bound = boundary(entry["side"], entry["by"], effect)
    if entry["measure"].get("curve"):
        effect, low, high, bound = (math.log(value) for value in (effect, low, high, entry["by"]))
    deviation = (high - low) / 2 / t_quantile(n) * math.sqrt(n)
    return effect - bound, deviation**2

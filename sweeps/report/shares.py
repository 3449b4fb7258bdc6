"""Shares of a few seeds, and whether two of them differ: binomial counts, exact tests."""

from __future__ import annotations

from dataclasses import dataclass

from sweeps.report.statistics import CONFIDENCE


@dataclass(frozen=True)
class Share:
    """How many of n seeds, with the 95 % interval of Clopper and Pearson (1934), which holds at
    least that often whatever the true share is.

    Attributes:
        count: of the seeds.
        n: all of them, at least one.
        low: the interval's lower end, of 0 .. 1.
        high: its upper end.
    """

    count: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """``count / n``."""
        return self.count / self.n


@dataclass(frozen=True)
class Unpaired:
    """Two shares, of seeds that are not paired: of equal seeds one setting may solve what the other
    does not, and the test does not ask which.

    Attributes:
        own: the setting's.
        other: the reference's.
        p: two-sided p-value of Fisher's exact test; None where one of the two has one seed.
        least: the smallest p-value that so many seeds can give; None likewise.
    """

    own: Share
    other: Share
    p: float | None
    least: float | None


def share(count: int, n: int) -> Share:
    """``count`` of ``n`` seeds with their interval."""
    from scipy import stats

    assert 0 <= count <= n and n >= 1
    found = stats.binomtest(count, n).proportion_ci(CONFIDENCE, "exact")
    return Share(count, n, float(found.low), float(found.high))


def unpaired(own: Share, other: Share) -> Unpaired:
    """Fisher's (1935) exact test on the counts of two settings."""
    if min(own.n, other.n) < 2:
        return Unpaired(own, other, None, None)
    least = _fisher(own.n, own.n, 0, other.n)
    return Unpaired(own, other, _fisher(own.count, own.n, other.count, other.n), least)


def _fisher(a: int, n_a: int, b: int, n_b: int) -> float:
    from scipy import stats

    return float(stats.fisher_exact([[a, n_a - a], [b, n_b - b]]).pvalue)

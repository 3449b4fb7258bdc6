"""Time until something happens that some seeds have not lived to see: Kaplan and Meier (1958)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Wait:
    """One seed's.

    Attributes:
        time: when it happened, or was last looked for in vain.
        ended: whether it happened; else the time is right-censored.
    """

    time: float
    ended: bool


@dataclass(frozen=True)
class Survival:
    """The share of seeds that still wait, ``prod over t_i <= t of 1 - d_i / n_i``: d_i ended at
    t_i, n_i were under watch until then.

    Attributes:
        times: at which seeds ended or were last looked at, rising.
        shares: that wait after each; 1 before the first.
        censored: the times of the seeds that did not end, rising.
        ended: how many did.
        n: all seeds.
    """

    times: tuple[float, ...]
    shares: tuple[float, ...]
    censored: tuple[float, ...]
    ended: int
    n: int

    @property
    def median(self) -> float | None:
        """The first time after which at most half wait; None where more do to the end."""
        # Half of the seeds is half, whatever the product's factors were rounded to.
        reached = [t for t, s in zip(self.times, self.shares, strict=True) if s <= 0.5 + 1e-9]
        return reached[0] if reached else None

    def after(self, time: float) -> float:
        """The share that waits after a time."""
        known = [s for t, s in zip(self.times, self.shares, strict=True) if t <= time]
        return known[-1] if known else 1.0


def survival(waits: Sequence[Wait]) -> Survival | None:
    """The estimate from all seeds' waits; None without one. Who was last looked at when another
    ended was under watch until then."""
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

"""``draft_depth="auto"``: measure while decoding how many drafts pay."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from statistics import median

import numpy as np

# The smallest gain over plain decoding at which drafts are used: while decoding, since timings
# scatter, and after a short measurement, since other texts also differ in acceptance.
MIN_GAIN, MIN_GAIN_MEASURED = 1.03, 1.1


@dataclass(frozen=True)
class Payoff:
    """The costs of rounds with 0, 1, .. drafts, and the acceptance of the drafts."""

    costs: tuple[float, ...]  # times in plain rounds
    accepted: tuple[float, ...]  # share of the drafts judged at position 1, 2, .. that is accepted

    def gains(self) -> list[float]:
        """Tokens per second with 0, 1, .. drafts, over plain decoding. A round with drafts has
        ``1 + sum_j prod_{i <= j} accepted_i`` expected tokens."""
        tokens = accumulate(accumulate(self.accepted, mul), initial=1.0)
        return [n / cost for n, cost in zip(tokens, self.costs, strict=False)]

    @property
    def best(self) -> int:
        """The number of drafts with the most tokens per second; 0 if that gains little."""
        return fastest(self.gains(), MIN_GAIN_MEASURED)


@dataclass(frozen=True)
class Measured:
    """Rounds of one model on one machine, with greedy and with sampled drafts."""

    greedy: Payoff
    sampled: Payoff

    @property
    def pays(self) -> bool:
        """Whether drafts pay in samples, or may pay in some greedy texts."""
        return self.sampled.best > 0 or max(self.greedy.gains()[1:]) > 1


def fastest(gains: Sequence[float], margin: float) -> int:
    """The number of drafts with the largest gain; 0 if none reaches the margin."""
    best = max(range(len(gains)), key=gains.__getitem__)
    return best if gains[best] >= margin else 0


class AutoDepth:
    """Chooses the number of drafts with the most tokens per second,

        (1 + sum_j prod_{i <= j} acceptance_i) / seconds,    0 drafts being plain decoding.

    It starts with the best number of a measurement, or with 0. Now and then it *probes*: it times a
    few rounds with another number of drafts. If the current number is 0, it probes ``max_draft``,
    and the times of the numbers between are interpolated; else it probes one draft more or less,
    and 0. Those rounds emit tokens like any others. Where drafts do not pay, the number of rounds
    between two probes doubles, up to a limit. Times are kept by batch size, rounded to powers of
    two; a new size starts with the number last used.

    Args:
        max_draft: the most drafts to consider.
        measured: greedy rounds of this model on this machine; None if nothing is known.
    """

    _MEMORY = 0.98  # decay per round of the acceptance's running mean
    _KNOWN = 20.0  # rounds that the measured shares of acceptance count as

    def __init__(self, max_draft: int, measured: Payoff | None = None) -> None:
        self.max_draft = max_draft
        # Without a measurement a weak prior: one draft of two accepted.
        self._accepted = [1.0] * max_draft
        self._reached = [2.0] * max_draft
        self._rounds = _Rounds(max_draft)
        self._by_size: dict[int, _Rounds] = {}  # by log2 of the number of rows
        if measured is not None and measured.best:  # a small gain is left to probes
            self._accepted = [self._KNOWN * share for share in measured.accepted]
            self._reached = [self._KNOWN] * max_draft
            self._rounds = _Rounds(max_draft, measured.best, measured.costs)

    def depth(self, rows: int, room: int | None = None) -> int:
        """The number of drafts of the next round of a batch of ``rows`` rows, of which the longest
        has room for ``room`` (None: for any). A probe waits for a round that it fits into."""
        size = round(math.log2(rows))
        if size not in self._by_size:
            new = _Rounds(self.max_draft, self.best) if self._by_size else self._rounds
            self._by_size[size] = new
        self._rounds = self._by_size[size]
        plan = self._rounds.plan
        return plan[0] if plan and (room is None or plan[0] <= room) else self.best

    @property
    def best(self) -> int:
        """The number of drafts that was fastest so far, apart from probes."""
        return self._rounds.best

    def record(
        self, m: int, seconds: float, accepted: Sequence[int], reached: Sequence[int]
    ) -> None:
        """Count a round of ``m`` drafts of the batch that :meth:`depth` was asked about. For each
        row, ``accepted`` is its number of accepted drafts, and ``reached`` that of the verified
        ones, the first rejected one included."""
        for j in range(m):
            n_reached = sum(r > j for r in reached)
            if n_reached:
                self._accepted[j] = self._accepted[j] * self._MEMORY + sum(a > j for a in accepted)
                self._reached[j] = self._reached[j] * self._MEMORY + n_reached
        if self._rounds.count(m, seconds):
            pairs = zip(self._accepted, self._reached, strict=True)
            self._rounds.decide(tuple(a / n for a, n in pairs))


class _Rounds:
    """The times of rounds of one batch size, and the best number of drafts for it.

    A plain round over long texts may take twice as long as one over short texts. So times are
    compared within one probe only, and their ratio to the time of a plain round is stored.
    """

    _EACH = 2  # rounds per number in a probe; the first may have much to catch up with
    _REVIEW = 16  # rounds from one decision to the next
    _OFTEN = 64  # rounds between probes while drafts pay
    _FIRST, _MOST = 256, 1024  # rounds until the first probe of plain decoding, and at most
    _HOPELESS = 4096  # the same if drafts would not pay even if all were accepted

    def __init__(self, max_draft: int, best: int = 0, costs: Sequence[float] = (1.0,)) -> None:
        self.best = best  # the number of drafts with the most tokens per second
        # For every number of drafts: the last rounds' times, and their ratios to plain rounds.
        self._seconds: list[deque[float]] = [deque(maxlen=9) for _ in range(max_draft + 1)]
        self._ratios: list[deque[float]] = [deque(maxlen=3) for _ in range(max_draft + 1)]
        for ratios, cost in zip(self._ratios, costs, strict=False):
            ratios.append(cost)
        self.plan: list[int] = []  # numbers of drafts to be timed in the next rounds
        self._since_probe = 0
        self._wait = self._FIRST
        self._deeper = True  # whether the next probe tries one draft more

    def count(self, m: int, seconds: float) -> bool:
        """Count a round of ``m`` drafts; returns whether it is time to decide again."""
        self._seconds[m].append(seconds)
        if self.plan:
            if m != self.plan[0]:  # it did not fit
                return False
            self.plan.pop(0)
            if not self.plan:
                self._compare()
            return not self.plan
        self._since_probe += 1
        if self._since_probe >= (self._OFTEN if self.best else self._wait):
            self._probe()
        return not self.plan and self._since_probe % self._REVIEW == 0

    def _probe(self) -> None:
        """Plan rounds of other numbers, the deepest first, so that only its rounds catch up."""
        deepest = len(self._seconds) - 1
        numbers = {deepest}
        if self.best:
            up = self.best < deepest and self._deeper
            self._deeper = not up
            numbers = {0, self.best + (1 if up else -1)}
        for m, seconds in enumerate(self._seconds):
            if m != self.best:  # the best number is represented by its last rounds
                seconds.clear()
        self.plan = [m for m in sorted(numbers, reverse=True) for _ in range(self._EACH)]
        self._since_probe, self._wait = 0, min(2 * self._wait, self._MOST)

    def _compare(self) -> None:
        # Take the shortest: other programs on the machine only ever make a round longer.
        plain, *drafted = (min(seconds, default=None) for seconds in self._seconds)
        for ratios, seconds in zip(self._ratios[1:], drafted, strict=True):
            if seconds and plain:
                # A round with drafts includes all the work of a plain one.
                ratios.append(max(seconds / plain, 1.0))

    def decide(self, accepted: tuple[float, ...]) -> None:
        """Choose the number of drafts with the most tokens per second; ``accepted`` as in
        :class:`Payoff`."""
        timed = [m for m, ratios in enumerate(self._ratios) if ratios]
        medians = [median(self._ratios[m]) for m in timed]
        costs = tuple(np.interp(range(timed[-1] + 1), timed, medians).tolist())
        if len(costs) == 1:
            return
        before, self.best = self.best, fastest(Payoff(costs, accepted).gains(), MIN_GAIN)
        if before and not self.best:
            self._wait = self._FIRST
        if max((m + 1) / cost for m, cost in enumerate(costs[1:], start=1)) < MIN_GAIN:
            self._wait = self._HOPELESS

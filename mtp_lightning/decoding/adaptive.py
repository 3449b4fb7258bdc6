"""How many tokens to draft: as many as pay, measured while decoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class AutoDepth:
    """``draft_depth="auto"``.

    The first rounds run the most drafts and none (they emit tokens like any other, so nothing is
    lost but speed) and time them; numbers between lie between, in time. Then the number with the
    most tokens a second is used: ``(1 + sum_j prod_{i <= j} acceptance_i) / seconds``, where 0
    drafts is plain decoding. One draft more or less, and none, are tried again for a few rounds now
    and then, ever more seldom while they do not pay.

    Args:
        max_draft: the most drafts to consider.
    """

    _EXPLORE = 2  # rounds of the most drafts, and of none, at the start
    _PROBE_ROUNDS = 2
    _FIRST_PAUSE = 96  # rounds until the next probe; doubles
    _REVIEW = 8  # rounds between decisions
    _MEMORY = 0.98  # of the acceptance's running mean, a round
    _MARGIN = 1.03  # what drafting must gain to be preferred: timings scatter

    def __init__(self, max_draft: int) -> None:
        self.max_draft = max_draft
        self._seconds: list[deque[float]] = [deque(maxlen=9) for _ in range(max_draft + 1)]
        # An even chance, worth little: one accepted of two.
        self._accepted = [1.0] * max_draft
        self._reached = [2.0] * max_draft
        # Deep to shallow: the deepest passes need no catching up later.
        self._plan = [m for m in sorted({0, max_draft}, reverse=True) for _ in range(self._EXPLORE)]
        self._best = max_draft
        self._pause = self._FIRST_PAUSE
        self._since_probe = 0
        self._since_review = 0
        self._deeper = True  # the next probe

    @property
    def depth(self) -> int:
        """Drafts of the next round."""
        return self._plan[0] if self._plan else self._best

    def rate(self, m: int) -> float:
        """Expected tokens a second of every row with ``m`` drafts; 0 while nobody can know."""
        seconds = self._expected_seconds(m)
        if seconds is None:
            return 0.0
        tokens = reach = 1.0
        for accepted, reached in zip(self._accepted[:m], self._reached[:m], strict=True):
            reach *= accepted / reached
            tokens += reach
        return tokens / seconds

    def _expected_seconds(self, m: int) -> float | None:
        """Of a round: timed, or between those that were."""
        timed = [i for i, seconds in enumerate(self._seconds) if seconds]
        below, above = [i for i in timed if i <= m], [i for i in timed if i >= m]
        if not below or not above:
            return None
        low, high = below[-1], above[0]
        # The shortest: whatever else runs on the machine makes a round longer, never shorter.
        at_low, at_high = min(self._seconds[low]), min(self._seconds[high])
        return at_low + (at_high - at_low) * (m - low) / max(high - low, 1)

    def record(
        self, m: int, seconds: float, accepted: Sequence[int], reached: Sequence[int]
    ) -> None:
        """Count a round of ``m`` drafts, one number of accepted and judged drafts a row."""
        self._seconds[m].append(seconds)
        for j in range(m):
            n_reached = sum(r > j for r in reached)
            if n_reached:
                self._accepted[j] = self._accepted[j] * self._MEMORY + sum(a > j for a in accepted)
                self._reached[j] = self._reached[j] * self._MEMORY + n_reached
        if self._plan:
            self._plan.pop(0)
            if not self._plan:
                self._decide()
            return
        self._since_probe += 1
        self._since_review += 1
        if self._since_probe >= self._pause:
            self._probe()
        elif self._since_review >= self._REVIEW:
            self._decide()

    def _probe(self) -> None:
        """Plan a few rounds of one draft more or less, in turn where both are possible, and one of
        none, which may have seemed slow."""
        self._since_probe = 0
        self._pause *= 2
        up = self._best < self.max_draft and (self._deeper or not self._best)
        self._deeper = not up
        other = self._best + (1 if up else -1)
        self._plan = [other] * self._PROBE_ROUNDS
        if self._best and other:
            self._plan.append(0)

    def forget_times(self) -> None:
        """Time anew: the batch has become much smaller."""
        for seconds in self._seconds:
            seconds.clear()
        self._plan = sorted({self._best, max(self._best - 1, 0), 0}, reverse=True)

    def _decide(self) -> None:
        self._since_review = 0
        plain = self.rate(0)
        best = max(range(self.max_draft + 1), key=self.rate)
        if best and self.rate(best) < plain * self._MARGIN:
            best = 0
        if best > self._best:
            self._pause = self._FIRST_PAUSE
        self._best = best

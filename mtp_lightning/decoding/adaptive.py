"""How many tokens to draft: as many as pay, measured while decoding."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence


class AutoDepth:
    """``draft_depth="auto"``.

    The first rounds run the most drafts and none (they emit tokens like any other, so nothing is
    lost but speed) and time them; numbers between lie between, in time. Then the number with the
    most tokens a second is used:
    ``(1 + sum_j prod_{i <= j} acceptance_i) / seconds``, where 0 drafts is plain decoding. One
    draft more or less, and none, are tried again for a few rounds now and then, ever more seldom
    while they do not pay. Batches of about as many rows are judged by their own times; one of
    another size begins with what the last one used.

    Args:
        max_draft: the most drafts to consider.
    """

    _MEMORY = 0.98  # of the acceptance's running mean, a round
    _OLD = 0.25  # of it, after a rest

    def __init__(self, max_draft: int) -> None:
        self.max_draft = max_draft
        # An even chance, worth little: one accepted of two.
        self._accepted = [1.0] * max_draft
        self._reached = [2.0] * max_draft
        # A round of one row is bound by other things than one of eight.
        self._by_size: dict[int, _Rounds] = {}
        self._rounds: _Rounds | None = None
        self._n_rows = 0

    def depth(self, rows: int) -> int:
        """Drafts of the next round, of so many rows."""
        if rows != self._n_rows:
            self._n_rows, size = rows, round(math.log2(rows))
            if size not in self._by_size:
                self._by_size[size] = _Rounds(self.max_draft, self._rounds)
            self._rounds = self._by_size[size]
        assert self._rounds is not None
        return self._rounds.depth

    def record(
        self, m: int, seconds: float, accepted: Sequence[int], reached: Sequence[int]
    ) -> None:
        """Count a round of ``m`` drafts, of the rows that :meth:`depth` was asked about: accepted
        and judged drafts, one number a row."""
        rounds = self._rounds
        assert rounds is not None
        if rounds.rest:
            rounds.rest -= 1
            if not rounds.rest:  # what was accepted long ago says little
                self._accepted = [a * self._OLD for a in self._accepted]
                self._reached = [r * self._OLD for r in self._reached]
            return
        for j in range(m):
            n_reached = sum(r > j for r in reached)
            if n_reached:
                self._accepted[j] = self._accepted[j] * self._MEMORY + sum(a > j for a in accepted)
                self._reached[j] = self._reached[j] * self._MEMORY + n_reached
        if rounds.is_review(m, seconds):
            rounds.decide(self._expected_tokens())

    def _expected_tokens(self) -> list[float]:
        """Of a round of 0, 1, .. drafts, a row."""
        tokens, reach = [1.0], 1.0
        for accepted, reached in zip(self._accepted, self._reached, strict=True):
            reach *= accepted / reached
            tokens.append(tokens[-1] + reach)
        return tokens


class _Rounds:
    """The times of rounds of about as many rows, and the number of drafts that pays there.

    Attributes:
        rest: rounds without drafts of which nothing is to be learned; whoever counts them down.
    """

    _EXPLORE = 2  # rounds of the most drafts, and of none, at the start
    _PROBE = 2  # rounds of another number
    _SETTLE = 32  # rounds of a new size before it is explored: a batch that ends is of many
    _PAUSE = 96  # rounds until the next probe; doubles
    _REST = 8  # times as long without drafts: modules have much to catch up with then
    _REVIEW = 16  # rounds between decisions
    _MARGIN = 1.03  # what drafting must gain to be preferred: timings scatter

    def __init__(self, max_draft: int, last: _Rounds | None) -> None:
        self._seconds: list[deque[float]] = [deque(maxlen=9) for _ in range(max_draft + 1)]
        self._best: int = max_draft if last is None else last._best
        self._plan: list[int] = []
        self._pause = self._PAUSE
        self._until_probe = 0 if last is None else self._SETTLE
        self._since_review = 0
        self._deeper = True  # the next probe
        self.rest = 0
        if last is None:
            self._explore()

    @property
    def depth(self) -> int:
        return self._plan[0] if self._plan else self._best

    def is_review(self, m: int, seconds: float) -> bool:
        """Count a round of ``m`` drafts, and say whether it is time to decide anew."""
        self._seconds[m].append(seconds)
        if self._plan:
            self._plan.pop(0)
            return not self._plan
        self._until_probe -= 1
        self._since_review += 1
        if self._until_probe <= 0:
            self._probe()
            return False
        return self._is_explored and self._since_review >= self._REVIEW

    @property
    def _is_explored(self) -> bool:
        return all((self._seconds[0], self._seconds[-1]))

    def _explore(self) -> None:
        # Deep to shallow: the deepest passes need no catching up later.
        self._plan = [m for m in (len(self._seconds) - 1, 0) for _ in range(self._EXPLORE)]

    def _probe(self) -> None:
        """Plan a few rounds of one draft more or less, in turn where both are possible, and of
        none, which may have become slower or have seemed slow."""
        if not self._is_explored:
            self._explore()
            return
        self._pause *= 2
        up = self._best < len(self._seconds) - 1 and (self._deeper or not self._best)
        self._deeper = not up
        other = self._best + (1 if up else -1)
        self._plan = [m for m in sorted({other, 0}, reverse=True) for _ in range(self._PROBE)]
        self._seconds[0].clear()

    def decide(self, expected_tokens: Sequence[float]) -> None:
        """Choose the number with the most tokens a second, of those to be expected a row."""
        self._since_review = 0
        seconds = [self._expected_seconds(m) for m in range(len(self._seconds))]
        rates = [tokens / s for tokens, s in zip(expected_tokens, seconds, strict=True)]
        best = max(range(len(rates)), key=rates.__getitem__)
        if rates[best] < rates[0] * self._MARGIN:
            best = 0
        if best > self._best:
            self._pause = self._PAUSE
        if best > self._best or self._until_probe <= 0:
            self._until_probe = self._pause
        self._best = best
        if not best:
            self.rest, self._until_probe = self._REST * self._pause, 1

    def _expected_seconds(self, m: int) -> float:
        """Of a round: timed, or between those that were, as the least and the most always are."""
        timed = [i for i, seconds in enumerate(self._seconds) if seconds]
        low = max(i for i in timed if i <= m)
        high = min(i for i in timed if i >= m)
        # The shortest: whatever else runs on the machine makes a round longer, never shorter.
        at_low, at_high = min(self._seconds[low]), min(self._seconds[high])
        return at_low + (at_high - at_low) * (m - low) / max(high - low, 1)

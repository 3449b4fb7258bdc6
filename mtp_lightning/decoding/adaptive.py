"""How many tokens to draft: as many as pay, measured while decoding."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median


class AutoDepth:
    """``draft_depth="auto"``.

    The number of drafts with the most tokens a second is used,
    ``(1 + sum_j prod_{i <= j} acceptance_i) / seconds``, where 0 drafts is plain decoding. It
    begins with none. Now and then a few rounds of another number are timed: of the most drafts (a
    number between is between in time), and while drafts are used of one more or less and of none.
    Those rounds emit tokens like any other. What they cost beside going on as before is counted,
    and never more than a small share of the time is spent on it: looking comes as soon as enough
    has been decoded, and as often as it is cheap. Batches of about as many rows are judged by their
    own times; one of another size begins with what the last one used.

    Args:
        max_draft: the most drafts to consider.
        module_share: what a token costs modules that have to catch up with it, of what a prompt's
            costs the trunk.
    """

    _SHARE = 0.0075  # of the time, to be spent on looking
    _MEMORY = 0.98  # of the acceptance's running mean, a round

    def __init__(self, max_draft: int, module_share: float = 0.0) -> None:
        self.max_draft = max_draft
        # An even chance, worth little: one accepted of two.
        self._accepted = [1.0] * max_draft
        self._reached = [2.0] * max_draft
        # A round of one row is bound by other things than one of eight.
        self._by_size: dict[int, _Rounds] = {}
        self._rounds: _Rounds | None = None
        self._n_rows = 0
        self._budget = 0.0  # seconds that may be lost
        self._module_share = module_share
        self._catch_up_seconds = 0.0  # of a token

    def read(self, tokens: int, seconds: float) -> None:
        """Count the reading of prompts."""
        self._budget += self._SHARE * seconds
        found = seconds / tokens * self._module_share
        self._catch_up_seconds = min(self._catch_up_seconds or found, found)

    def depth(self, rows: int, behind: Callable[[], int]) -> int:
        """Drafts of the next round.

        Args:
            rows: of the batch.
            behind: how many tokens the modules would have to catch up with.
        """
        if rows != self._n_rows:
            self._n_rows, size = rows, round(math.log2(rows))
            if size not in self._by_size:
                self._by_size[size] = _Rounds(self.max_draft, self._rounds)
            self._rounds = self._by_size[size]
        rounds = self._rounds
        assert rounds is not None
        if rounds.may_look:
            rounds.may_look, cost, means = False, rounds.cost_of_a_look, self._budget / rounds.price
            if not rounds.best and means > cost:
                cost += behind() * self._catch_up_seconds
            if means > cost:
                rounds.look()
        return rounds.plan[0] if rounds.plan else rounds.best

    def record(
        self, m: int, seconds: float, accepted: Sequence[int], reached: Sequence[int]
    ) -> None:
        """Count a round of ``m`` drafts, of the rows that :meth:`depth` was asked about: accepted
        and judged drafts, one number a row."""
        rounds = self._rounds
        assert rounds is not None
        self._budget += self._SHARE * seconds
        if m:
            self._judge(m, accepted, reached)
        if rounds.plan:
            tokens = 1 + sum(accepted) / len(accepted)
            lost = max(0.0, seconds - tokens * rounds.seconds_per_token)
            self._budget -= lost * rounds.price
        if rounds.is_review(m, seconds):
            rounds.decide(self._expected_tokens())

    def _judge(self, m: int, accepted: Sequence[int], reached: Sequence[int]) -> None:
        for j in range(m):
            n_reached = sum(r > j for r in reached)
            if n_reached:
                self._accepted[j] = self._accepted[j] * self._MEMORY + sum(a > j for a in accepted)
                self._reached[j] = self._reached[j] * self._MEMORY + n_reached

    def _expected_tokens(self) -> list[float]:
        """Of a round of 0, 1, .. drafts, a row."""
        tokens, reach = [1.0], 1.0
        for accepted, reached in zip(self._accepted, self._reached, strict=True):
            reach *= accepted / reached
            tokens.append(tokens[-1] + reach)
        return tokens


class _Rounds:
    """The times of rounds of about as many rows, and the number of drafts that pays there.

    A plain round over long texts may take twice as long as one over short ones: times are compared
    within a look alone, and what is kept of it is their ratio.

    Attributes:
        best: that number.
        plan: numbers to be timed in the next rounds.
        may_look: whether it is time to make such a plan, if there are the means.
        seconds_per_token: of a row, with the best number.
        cost_of_a_look: seconds that the next plan is expected to lose, but for catching up.
        price: of such a second, in seconds that may be lost.
    """

    _EACH = 2  # rounds of a number that is looked at; the first may have much to catch up with
    _REVIEW = 16  # rounds from one decision to the next
    _HOPELESS = 8  # price where drafts would not pay even if all were right: only times may change
    _MARGIN = 1.03  # what drafting must gain to be preferred: timings scatter

    def __init__(self, max_draft: int, last: _Rounds | None) -> None:
        # The last rounds' of every number, and what they took beside plain ones in the last looks.
        self._seconds: list[deque[float]] = [deque(maxlen=9) for _ in range(max_draft + 1)]
        self._ratios: list[deque[float]] = [deque(maxlen=3) for _ in range(max_draft + 1)]
        self._ratios[0].append(1.0)
        self.best: int = 0 if last is None else last.best
        self.plan: list[int] = []
        self.may_look = False
        self.seconds_per_token = 0.0
        self.cost_of_a_look = math.inf
        self.price = 1
        self._until_review = self._REVIEW
        self._deeper = True  # the next look

    def is_review(self, m: int, seconds: float) -> bool:
        """Count a round of ``m`` drafts, and say whether it is time to decide anew."""
        self._seconds[m].append(seconds)
        if self.plan:
            self.plan.pop(0)
            if not self.plan:
                self._compare()
            return not self.plan
        self._until_review -= 1
        self.may_look = not self._until_review
        return self.may_look

    def look(self) -> None:
        """Plan rounds of other numbers, the deepest first: the others need no catching up then."""
        deepest = len(self._seconds) - 1
        others = {deepest}
        if self.best:
            up = self.best < deepest and self._deeper
            self._deeper = not up
            others = {0, self.best + (1 if up else -1)}
        for m, seconds in enumerate(self._seconds):
            if m != self.best:  # its last rounds are its part of the look
                seconds.clear()
        self.plan = [m for m in sorted(others, reverse=True) for _ in range(self._EACH)]

    def _compare(self) -> None:
        # The shortest: whatever else runs on the machine makes a round longer, never shorter.
        shortest = [min(seconds, default=None) for seconds in self._seconds]
        plain = shortest[0]
        for ratios, seconds in zip(self._ratios[1:], shortest[1:], strict=True):
            if seconds and plain:
                # A round with drafts has all that a plain one has.
                ratios.append(max(seconds / plain, 1.0))

    def decide(self, expected_tokens: Sequence[float]) -> None:
        """Choose the number with the most tokens a second, of those to be expected a row."""
        self._until_review = self._REVIEW
        known = [m for m, ratios in enumerate(self._ratios) if ratios]
        costs = [self._cost(m, known) for m in range(known[-1] + 1)]
        gains = [tokens / cost for tokens, cost in zip(expected_tokens, costs, strict=False)]
        if len(costs) > 1:
            self.best = max(range(len(gains)), key=gains.__getitem__)
            if gains[self.best] < self._MARGIN:
                self.best = 0
            most = max((m + 1) / cost for m, cost in enumerate(costs[1:], start=1))
            self.price = self._HOPELESS if most < self._MARGIN else 1
        if not self._seconds[self.best]:  # it is between those that were timed
            return
        now = min(self._seconds[self.best])
        self.seconds_per_token = now / expected_tokens[self.best]
        # A draft and its verification take about half of a pass, if most of them fail.
        drafts = 1 if self.best else len(self._seconds) - 1
        self.cost_of_a_look = self._EACH * now * drafts / 2

    def _cost(self, m: int, known: list[int]) -> float:
        """Of a round, in plain ones: compared, or between two that were."""
        low, high = max(i for i in known if i <= m), min(i for i in known if i >= m)
        at_low, at_high = median(self._ratios[low]), median(self._ratios[high])
        return at_low + (at_high - at_low) * (m - low) / max(high - low, 1)

"""Whether settings differ in how many seeds solve a task: Fisher's exact test, unpaired."""

from __future__ import annotations

from collections.abc import Sequence

from sweeps.report.comparisons import (
    LEVEL,
    OTHER_QUESTIONS,
    Comparison,
    may_compare,
    references,
)
from sweeps.report.metrics import EXACT
from sweeps.report.settings import Setting, Settings
from sweeps.report.shares import Unpaired, unpaired
from sweeps.report.solving import solved_share
from sweeps.report.statistics import holm


def compare_solved(settings: Settings, *, reference: str | None = None) -> list[Comparison]:
    """Test every setting's share of seeds that solve against its reference's, with Holm's
    correction over all of them.

    Args:
        settings: of a task's sweep.
        reference: as in :func:`sweeps.report.comparisons.compare`.

    Raises:
        UserError: ``reference`` names no setting, or several.
    """
    chosen = references(settings, reference)
    pairs = [(s, r) for s, r in zip(settings.all, chosen, strict=True) if s is not r]
    found = [_test(s, r, settings.level) for s, r in pairs]
    tested = {i: t.p for i, t in enumerate(found) if t and t.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return [
        Comparison(s, r, None, adjusted.get(i), _verdict(s, r, found[i], adjusted.get(i)), found[i])
        for i, (s, r) in enumerate(pairs)
    ]


def smallest_p(comparisons: Sequence[Comparison]) -> float | None:
    """The smallest p-value that any outcome could have after the correction, with as many seeds
    and tests; None without a test."""
    tests = [c.solved for c in comparisons if c.solved and c.adjusted is not None]
    least = [test.least for test in tests if test.least is not None]
    return min(1.0, len(least) * min(least)) if least else None


def _test(setting: Setting, reference: Setting, level: float) -> Unpaired | None:
    own, other = solved_share(setting, level), solved_share(reference, level)
    if own is None or other is None or not may_compare(setting, reference, EXACT):
        return None
    return unpaired(own, other)


def _verdict(
    setting: Setting, reference: Setting, test: Unpaired | None, adjusted: float | None
) -> str:
    if not (setting.estimate(EXACT).interval and reference.estimate(EXACT).interval):
        return "no test: a share is missing"
    if test is None:
        return OTHER_QUESTIONS
    if adjusted is None:
        return "one seed: no test"
    return "beyond noise" if adjusted < LEVEL else "within noise"

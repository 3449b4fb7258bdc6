"""Differences between settings, and whether the seeds' noise would explain them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtp_lightning.errors import UserError
from sweeps.report.comparable import same_text
from sweeps.report.settings import Setting, Settings, show
from sweeps.report.shares import Unpaired
from sweeps.report.statistics import Paired, holm, paired
from sweeps.report.texts import rests_on_text

LEVEL = 0.05
FACT = "a fact about this data: the same at every seed, no test"
OTHER_TEXT = "not compared: another evaluation text"
OTHER_QUESTIONS = "not compared: other questions"


@dataclass(frozen=True)
class Comparison:
    """One setting against its reference.

    Attributes:
        setting: the one.
        reference: the other.
        result: of the paired test; None where no seed has both, a mean is missing, or the two were
            evaluated on different texts, and for a task, whose settings are compared by the seeds
            that solve it.
        adjusted: Holm's p-value among all tests of the report; None where there is no test.
        verdict: in words.
        solved: of a task, the two shares of seeds with their test; None where there is no share.
    """

    setting: Setting
    reference: Setting
    result: Paired | None
    adjusted: float | None
    verdict: str
    solved: Unpaired | None = None

    @property
    def against(self) -> str:
        """The reference, by the keys in which it differs from the setting."""
        own = self.setting.values
        other = {k: v for k, v in self.reference.values.items() if show(v) != show(own.get(k))}
        return ", ".join(f"{key}={show(value)}" for key, value in other.items())

    @property
    def refused(self) -> bool:
        """Whether the two are numbers of different evaluation texts."""
        return self.verdict in (OTHER_TEXT, OTHER_QUESTIONS)

    @property
    def differs(self) -> bool:
        """Whether the difference is beyond noise."""
        return self.adjusted is not None and self.adjusted < LEVEL


def compare(settings: Settings, tag: str, *, reference: str | None = None) -> list[Comparison]:
    """Test every setting against its reference, with Holm's correction over all of them.

    Args:
        settings: of the sweep.
        tag: the metric.
        reference: label of the setting that all others are compared with, or a part of it that
            names one; by default see :func:`references`.

    Raises:
        UserError: ``reference`` names no setting, or several.
    """
    chosen = references(settings, reference)
    pairs = [(s, r) for s, r in zip(settings.all, chosen, strict=True) if s is not r]
    results = [
        paired(s.estimate(tag).values, r.estimate(tag).values)
        if s.estimate(tag).interval and r.estimate(tag).interval and may_compare(s, r, tag)
        else None
        for s, r in pairs
    ]
    tested = [i for i, result in enumerate(results) if result and result.p is not None]
    adjusted = dict(zip(tested, holm([results[i].p for i in tested]), strict=True))  # type: ignore
    return [
        Comparison(
            s, r, results[i], adjusted.get(i), _verdict(s, r, tag, results[i], adjusted.get(i))
        )
        for i, (s, r) in enumerate(pairs)
    ]


def references(settings: Settings, named: str | None = None) -> list[Setting]:
    """The reference of every setting.

    By default it is the one with the smallest value of the first varied key (no MTP, if the depth
    is varied) and equal values of all others; where such a one is missing for some setting, the
    first setting is everybody's reference.
    """
    if named is not None:
        return [_find(settings, named)] * len(settings.all)
    if not settings.all:
        return []
    # Sorted by the first key: the first of every stratum has its smallest value.
    strata: dict[tuple[str, ...], Setting] = {}
    for setting in settings.all:
        strata.setdefault(_others(setting), setting)
    smallest = {show(next(iter(s.values.values()), None)) for s in strata.values()}
    if len(smallest) == 1:
        return [strata[_others(setting)] for setting in settings.all]
    plain = [setting for setting in settings.all if setting.depth == 0]
    return [(plain or settings.all)[0]] * len(settings.all)


def _others(setting: Setting) -> tuple[str, ...]:
    return tuple(show(value) for value in list(setting.values.values())[1:])


def _find(settings: Settings, named: str) -> Setting:
    wanted = {part.strip() for part in named.split(", ")}
    found = [s for s in settings.all if wanted <= set(s.label.split(", "))]
    if len(found) != 1:
        which = "no setting" if not found else f"{len(found)} settings"
        known = "; ".join(setting.label for setting in settings.all)
        raise UserError(f"--reference {named!r} names {which}: choose one of: {known}.")
    return found[0]


def may_compare(setting: Setting, reference: Setting, tag: str) -> bool:
    """Whether a metric of two settings is measured on the same text, or on none."""
    return not rests_on_text(tag) or same_text(setting, reference)


def _verdict(
    setting: Setting,
    reference: Setting,
    tag: str,
    result: Paired | None,
    adjusted: float | None,
) -> str:
    if not (setting.estimate(tag).interval and reference.estimate(tag).interval):
        return "no test: a mean is missing"
    if not may_compare(setting, reference, tag):
        return OTHER_TEXT
    if result is None:
        return "no seed in common"
    if result.constant:
        return "identical" if result.difference.mean == 0 else FACT
    if adjusted is None:
        return "one seed: no test"
    return "beyond noise" if adjusted < LEVEL else "within noise"


def sparse(comparisons: Sequence[Comparison]) -> bool:
    """Whether some test rests on fewer than five pairs, too few to see any but large effects."""
    return any(
        c.result and c.result.p is not None and c.result.difference.n < 5 for c in comparisons
    )


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, loss) points no other is at least as good as in both, and better in one."""
    return [
        not any(
            cost <= own_cost and loss <= own_loss and (cost, loss) != (own_cost, own_loss)
            for cost, loss in points
        )
        for own_cost, own_loss in points
    ]

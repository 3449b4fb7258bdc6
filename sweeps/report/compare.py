"""Compares settings, and tests whether noise between seeds explains their differences.

Losses are compared seed by seed (paired t-test). Settings of a task are compared by the share of
seeds that solve it (Fisher's exact test, unpaired) and by the time to solve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from mtp_lightning.errors import UserError
from mtp_lightning.run.config import lies_in
from mtp_lightning.run.solved import EXACT, first_above, is_above
from sweeps.report import statistics
from sweeps.report.collect import FOLDER
from sweeps.report.comparable import may_compare
from sweeps.report.read import RunRecord
from sweeps.report.settings import FOLLOWING, OF_DEPTHS, Setting, Settings, show
from sweeps.report.statistics import LEVEL, Paired, Share, Survival, Unpaired, Wait

FACT = "the same at every seed, so there is no variance to test"
OTHER_DATA = "not compared: other evaluation data"


@dataclass(frozen=True)
class Comparison:
    """One setting against its reference."""

    setting: Setting  # the compared setting
    reference: Setting  # the setting that it is compared with
    # Of the test: paired differences, or, for a task, the two shares of seeds that solve; None if
    # no seed has both, a mean is missing, or the texts differ.
    result: Paired | Unpaired | None
    adjusted: float | None  # Holm's p-value among all tests of the report; None without a test
    verdict: str  # the result in words

    @property
    def paired(self) -> Paired | None:
        """The result if it is of paired differences."""
        return self.result if isinstance(self.result, Paired) else None

    @property
    def solved(self) -> Unpaired | None:
        """The result if it is of shares."""
        return self.result if isinstance(self.result, Unpaired) else None

    @property
    def against(self) -> Setting:
        """The reference's values of the keys in which it differs from the setting."""
        keys = _differing(self.reference, self.setting)
        return Setting(values={key: self.reference.values[key] for key in keys}, config={})

    @property
    def refused(self) -> bool:
        """Whether the two were evaluated on different data."""
        return self.verdict == OTHER_DATA

    @property
    def differs(self) -> bool:
        """Whether the difference is beyond noise."""
        return self.adjusted is not None and self.adjusted < LEVEL


def compare(settings: Settings, *, reference: str | None = None) -> list[Comparison]:
    """Test every setting against its reference (:func:`references`), with Holm's correction over
    all of them.

    Raises:
        UserError: ``reference`` names no setting, or several.
    """
    baselines = references(settings, reference)
    pairs = [(s, r) for s, r in zip(settings.all, baselines, strict=True) if s is not r]
    results = [
        (_unlike(s, r) if reference is None else "") or _tested(settings, s, r) for s, r in pairs
    ]
    ps = {i: t.p for i, t in enumerate(results) if not isinstance(t, str) and t.p is not None}
    adjusted = dict(zip(ps, statistics.holm(list(ps.values())), strict=True))
    return [
        Comparison(s, r, None, None, test)
        if isinstance(test, str)
        else Comparison(s, r, test, adjusted.get(i), _verdict(test, adjusted.get(i)))
        for i, ((s, r), test) in enumerate(zip(pairs, results, strict=True))
    ]


def _unlike(setting: Setting, plain: Setting) -> str:
    """Why heads are not compared with plain training of another size, length or text, unless asked
    for; empty if they are."""
    if not plain.is_plain or setting.is_plain:
        return ""
    groups = ("trainer.max_steps", "model", "data", "tokenizer")
    a, b = setting.config, plain.config
    # Their names may leave out keys that a preset has set.
    keys = [k for k in dict.fromkeys((*a, *b)) if lies_in(k, groups) and k not in FOLLOWING]
    keys = [key for key in keys if a.get(key) != b.get(key)]
    if len(keys) > 4:
        keys = [group for group in groups if any(lies_in(key, (group,)) for key in keys)]
    return f"not compared: no plain training with the same {', '.join(keys)}" if keys else ""


def _tested(settings: Settings, setting: Setting, reference: Setting) -> Paired | Unpaired | str:
    """The test of a setting against its reference, or the reason why there is none."""
    estimate, baseline = (s.estimate(settings.compared_tag) for s in (setting, reference))
    if not (estimate.interval and baseline.interval):
        return f"no test: a {'share' if settings.is_task else 'mean'} is missing"
    if not may_compare(setting, reference):
        return OTHER_DATA
    if not settings.is_task:
        return statistics.paired(estimate.values, baseline.values) or "no seed in common"
    own_share, baseline_share = (solved_share(s, settings.level) for s in (setting, reference))
    assert own_share is not None and baseline_share is not None
    return statistics.unpaired(own_share, baseline_share)


def _verdict(result: Paired | Unpaired, adjusted: float | None) -> str:
    if isinstance(result, Paired) and result.constant:
        return "identical" if result.difference.mean == 0 else FACT
    if adjusted is None:
        return "one seed: no test"
    return "beyond noise" if adjusted < LEVEL else "within noise"


def references(settings: Settings, label: str | None = None) -> list[Setting]:
    """The reference of every setting: the one that is named by its label, or by an unambiguous part
    of it.

    By default, settings with MTP are compared with the most similar one without: it differs in the
    fewest keys that bear on plain training, then in the fewest of all. Two folders are compared
    setting by setting, and settings that all have MTP, or none, with the smallest value of the
    first varied key at equal values of the others; where one has no such reference, with the first.
    """
    if label is not None:
        return [_find(settings, label)] * len(settings.all)
    plain = [setting for setting in settings.all if setting.is_plain]
    if FOLDER in settings.varied or len(plain) in (0, len(settings.all)):
        # Sorted by the first key: the first of every stratum has its smallest value.
        strata: dict[tuple[str, ...], Setting] = {}
        for setting in settings.all:
            strata.setdefault(_others(setting), setting)
        smallest = {show(next(iter(s.values.values()), None)) for s in strata.values()}
        if len(smallest) == 1:
            return [strata[_others(setting)] for setting in settings.all]
    return [min(plain or settings.all[:1], key=partial(_distance, s)) for s in settings.all]


def _others(setting: Setting) -> tuple[str, ...]:
    """The values of all keys but the first."""
    return tuple(show(value) for value in list(setting.values.values())[1:])


def _differing(setting: Setting, other: Setting) -> list[str]:
    """The varied keys in which two settings differ."""
    return [k for k, v in setting.values.items() if show(v) != show(other.values.get(k))]


def _distance(setting: Setting, plain: Setting) -> tuple[int, int]:
    """How many varied keys differ outside the groups of MTP, and how many in all."""
    differ = _differing(setting, plain)
    return sum(not lies_in(key, OF_DEPTHS) for key in differ), len(differ)


def _find(settings: Settings, label: str) -> Setting:
    parts = {part.strip() for part in label.split(", ")}
    matches = [s for s in settings.all if parts <= set(s.label.split(", "))]
    if len(matches) != 1:
        which = "no setting" if not matches else f"{len(matches)} settings"
        labels = "; ".join(setting.label for setting in settings.all)
        raise UserError(f"--reference {label!r} names {which}: choose one of: {labels}.")
    return matches[0]


def smallest_p(comparisons: Sequence[Comparison]) -> float | None:
    """The smallest corrected p-value that the exact tests can reach with these numbers of seeds and
    tests; None without a test."""
    tests = [c.solved for c in comparisons if c.solved]
    least = [test.least for test in tests if test.least is not None]
    return min(1.0, len(least) * min(least)) if least else None


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, loss) points are not dominated by another one."""
    return [
        not any(
            cost <= own_cost and loss <= own_loss and (cost, loss) != (own_cost, own_loss)
            for cost, loss in points
        )
        for own_cost, own_loss in points
    ]


def solved_share(setting: Setting, level: float) -> Share | None:
    """The share of finished seeds whose exact match is above the level; None if one has none."""
    exact = setting.estimate(EXACT)
    if exact.interval is None:
        return None
    n_solved = sum(is_above(value, level) for value in exact.values.values())
    return statistics.share(n_solved, len(exact.values))


def wait_of(run: RunRecord, level: float, tag: str = EXACT) -> Wait | None:
    """Optimizer steps to a run's first validation above the level, or to the last validation if
    none was above; None without a validation."""
    solved_row = first_above(run.rows, level, tag)
    if solved_row is not None:
        return Wait(solved_row["step"], True)
    steps = [row["step"] for row in run.rows if math.isfinite(row.get(tag, math.nan))]
    return Wait(max(steps), False) if steps else None


def time_to_solve(setting: Setting, level: float) -> Survival | None:
    """The time to solve over all seeds with a validation, unfinished ones too; None without any."""
    waits = (wait_of(run, level) for run in setting.runs)
    return statistics.survival([wait for wait in waits if wait])

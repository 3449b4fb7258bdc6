"""What the tables have of a task beside means: shares of seeds, median times, exact tests."""

from __future__ import annotations

from typing import Any

from sweeps.report.comparisons import Comparison
from sweeps.report.metrics import EXACT, Metric, number, p_value
from sweeps.report.settings import Setting
from sweeps.report.shares import Share
from sweeps.report.solving import solved_share, time_to_solve

_STEPS = Metric("", "Median time", "steps to solve", 0)
SOLVED_COLUMNS = (Metric("", "Solved", "of seeds", "%"), _STEPS)


def solved_cells(setting: Setting, level: float) -> list[dict[str, Any]]:
    """The cells of :data:`SOLVED_COLUMNS`."""
    share, curve = solved_share(setting, level), time_to_solve(setting, level)
    median = curve.median if curve else None
    late = f"not by step {curve.times[-1]:,.0f}" if curve and median is None else ""
    return [
        _cell(
            None if share is None else share.rate,
            SOLVED_COLUMNS[0],
            beside="" if share is None else f"{share.count} of {share.n}: {ends(share)}",
            gap=setting.estimate(EXACT).gap,
        ),
        _cell(median, _STEPS, beside=late),
    ]


def solved_test(found: Comparison) -> dict[str, Any]:
    """A row of the table of differences."""
    test = found.solved
    return {
        "setting": found.setting.label,
        "reference": found.against,
        "own": _share(test.own if test else None),
        "other": _share(test.other if test else None),
        "p": p_value(test.p) if test else "",
        "p_sort": repr(test.p) if test and test.p is not None else "",
        "adjusted": p_value(found.adjusted),
        "adjusted_sort": "" if found.adjusted is None else repr(found.adjusted),
        "verdict": found.verdict,
        "differs": found.differs,
    }


def ends(share: Share) -> str:
    """A share's interval: ``28.4 % to 99.5 %``."""
    return f"{number(share.low, '%')} to {number(share.high, '%')}"


def _share(share: Share | None) -> dict[str, str]:
    if share is None:
        return {"sort": "", "count": "–", "beside": ""}
    count = f"{share.count} of {share.n}"
    return {"sort": repr(share.rate), "count": count, "beside": ends(share)}


def _cell(value: float | None, metric: Metric, *, beside: str, gap: str = "") -> dict[str, Any]:
    return {
        "sort": "" if value is None else repr(value),
        "mean": "–" if value is None else metric.show(value),
        "spread": "",
        "gap": gap,
        "beside": beside,
    }

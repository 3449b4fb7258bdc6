"""When a task was solved: one definition for runs, sweeps and reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

EXACT = "val/exact_match"
"""The share of right answers at a validation."""
SOLVED = 0.95
"""Exact match above which a task is solved, where nobody says otherwise."""

_COST = ("tokens", "flops", "seconds")
_ROUNDING = 1e-7  # of what Lightning logs: in single precision 0.98 is above 0.98


def first_above(
    rows: Iterable[Mapping[str, float]], level: float = SOLVED, tag: str = EXACT
) -> Mapping[str, float] | None:
    """The first validation with exact match above a level, whatever came after it; None if there
    is none yet.

    Args:
        rows: of ``metrics.csv``, in order.
        level: of 0 .. 1.
        tag: of exact match, such as that of another test set.
    """
    # What is no number is above nothing.
    return next((row for row in rows if row.get(tag, math.nan) - level > _ROUNDING), None)


def time_to_solve(
    rows: Iterable[Mapping[str, float]], level: float = SOLVED
) -> dict[str, float] | None:
    """``step``, and ``tokens``, ``flops`` and ``seconds`` of training, before the validation of
    :func:`first_above`; None if there is none yet."""
    row = first_above(rows, level)
    if row is None:
        return None
    spent = {name: row[f"progress/{name}"] for name in _COST if f"progress/{name}" in row}
    # Counts are whole, and logged as floats.
    whole = {name: v if name == "seconds" else int(v) for name, v in spent.items()}
    return {"step": int(row["step"]), **whole}

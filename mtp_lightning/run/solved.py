"""Defines when a task counts as solved, for runs, sweeps and reports alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

EXACT = "val/exact_match"  # the log tag of a validation's share of right answers
SOLVED = 0.95  # the default level of exact match above which a task counts as solved

_COST = ("tokens", "flops", "seconds")
_ROUNDING = 1e-7  # Lightning logs in float32, which rounds 0.98 up to 0.98000002


def is_above(value: float, level: float) -> bool:
    """Whether a share of right answers, as it was logged, is above a level; NaN never is."""
    return value - level > _ROUNDING


def first_above(
    rows: Iterable[Mapping[str, float]], level: float = SOLVED, tag: str = EXACT
) -> Mapping[str, float] | None:
    """Find the first row of ``metrics.csv`` whose exact match is above ``level`` (0 to 1); None if
    there is none yet. Later rows may lie below it. ``tag`` is that of the test set."""
    return next((row for row in rows if is_above(row.get(tag, math.nan), level)), None)


def time_to_solve(
    rows: Iterable[Mapping[str, float]], level: float = SOLVED
) -> dict[str, float] | None:
    """The cost of training up to the validation of :func:`first_above`: ``step``, ``tokens``,
    ``flops`` and ``seconds``; None if there is none yet."""
    row = first_above(rows, level)
    if row is None:
        return None
    spent = {name: row[f"progress/{name}"] for name in _COST if f"progress/{name}" in row}
    # Counts are logged as floats.
    cost = {name: v if name == "seconds" else int(v) for name, v in spent.items()}
    return {"step": int(row["step"]), **cost}

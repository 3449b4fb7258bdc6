"""When a task counts as solved, from the rows of ``metrics.csv``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mtp_lightning.run.solved import EXACT, SOLVED, first_above, time_to_solve


def row(step: int, right: float | None = None, **more: float) -> dict[str, Any]:
    spent = {f"progress/{name}": value for name, value in more.items()}
    return {"step": step} | spent | ({} if right is None else {EXACT: right})


def test_the_first_validation_above_the_level_counts() -> None:
    rows = [row(1), row(10, 0.5), row(11), row(20, math.nan), row(30, 0.96), row(40, 0.2)]
    assert first_above(rows) == rows[4]
    assert first_above(rows, 0.4) == rows[1]
    assert first_above(rows, 0.96) is None and first_above([]) is None
    assert first_above([row(1, 1.0)], 0) == row(1, 1.0)


@pytest.mark.parametrize("level", [SOLVED, 0.98, 0.9, 0.7, 0.1])
def test_a_level_is_not_above_itself_in_single_precision(level: float) -> None:
    """Lightning logs in single precision, in which 49 of 50 is a little above 0.98."""
    assert first_above([row(1, float(np.float32(level)))], level) is None
    assert first_above([row(1, float(np.float32(level + 1e-5)))], level) is not None


def test_time_to_solve_has_the_steps_cost() -> None:
    rows = [row(10, 0.5, tokens=1.0, flops=2.0, seconds=3.0)]
    rows.append(row(20, 1.0, tokens=1e3, flops=2e15, seconds=3.25))
    cost = time_to_solve(rows)
    assert cost == {"step": 20, "tokens": 1000, "flops": 2 * 10**15, "seconds": 3.25}
    assert [type(value) for value in cost.values()] == [int, int, int, float]
    assert time_to_solve(rows[:1]) is None
    assert time_to_solve([row(5, 1.0)]) == {"step": 5}

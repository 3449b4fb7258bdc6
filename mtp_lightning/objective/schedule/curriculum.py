"""Schedules that add or remove depths one by one, in D + 1 equal stages (Aynetdinov & Akbik
2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from mtp_lightning.objective.schedule.piecewise import preset


def _stages(active: Callable[[int], Iterable[int]]) -> Callable[[int], Mapping[float, list[float]]]:
    """The knots, from the stages: D -> the number of active depths in each."""
    return lambda depth: {
        stage / (depth + 1): [float(k < count) for k in range(depth)]
        for stage, count in enumerate(active(depth))
    }


forward_curriculum = preset(_stages(lambda depth: range(depth + 1)), shared=True)
reverse_curriculum = preset(_stages(lambda depth: range(depth, -1, -1)), shared=True)

"""Schedules that add or remove depths one by one, in D + 1 equal stages (Aynetdinov & Akbik
2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mtp_lightning.objective.schedule.piecewise import Piecewise, base_weights, scaled


def _curriculum(active: Callable[[int], Iterable[int]]) -> Callable[..., Piecewise]:
    """A schedule from its stages: D -> the number of active depths in each."""

    def schedule(
        depth: int,
        mtp_lambda: float | Sequence[float],
        unit: str = "fraction",
        length: float | None = None,
    ) -> Piecewise:
        base = base_weights(depth, mtp_lambda)
        knots = {
            stage / (depth + 1): [float(k < count) for k in range(depth)]
            for stage, count in enumerate(active(depth))
        }
        return Piecewise(depth, base, scaled(knots, unit, length), unit, "step")

    return schedule


forward_curriculum = _curriculum(lambda depth: range(depth + 1))
reverse_curriculum = _curriculum(lambda depth: range(depth, -1, -1))

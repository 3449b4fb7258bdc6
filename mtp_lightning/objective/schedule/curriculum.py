"""Schedules that add or remove depths one by one, in D + 1 equal stages (Aynetdinov & Akbik
2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mtp_lightning.objective.schedule.piecewise import Piecewise, base_weights, preset


def _curriculum(active: Callable[[int], Iterable[int]]) -> Callable[..., Piecewise]:
    """A schedule from its stages: D -> the number of active depths in each."""
    of_weights = preset(
        lambda depth: {
            stage / (depth + 1): [float(k < count) for k in range(depth)]
            for stage, count in enumerate(active(depth))
        }
    )

    def schedule(
        depth: int,
        mtp_lambda: float | Sequence[float],
        unit: str = "fraction",
        length: float | None = None,
    ) -> Piecewise:
        # Multiples in a list are of a list of weights, which stay exact.
        return of_weights(depth, base_weights(depth, mtp_lambda), unit, length)

    return schedule


forward_curriculum = _curriculum(lambda depth: range(depth + 1))
reverse_curriculum = _curriculum(lambda depth: range(depth, -1, -1))

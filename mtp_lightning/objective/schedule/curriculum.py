"""Schedules that add or remove depths one by one (Aynetdinov & Akbik 2025)."""

from __future__ import annotations

from collections.abc import Sequence

from mtp_lightning.objective.schedule.piecewise import Piecewise, base_weights, scaled


def forward_curriculum(
    depth: int,
    mtp_lambda: float | Sequence[float],
    unit: str = "fraction",
    length: float | None = None,
) -> Piecewise:
    """0, 1, .. D depths are active in D + 1 equal stages (Aynetdinov & Akbik 2025)."""
    return _curriculum(depth, mtp_lambda, list(range(depth + 1)), unit, length)


def reverse_curriculum(
    depth: int,
    mtp_lambda: float | Sequence[float],
    unit: str = "fraction",
    length: float | None = None,
) -> Piecewise:
    """D, D - 1, .. 0 depths are active in D + 1 equal stages (Aynetdinov & Akbik 2025)."""
    return _curriculum(depth, mtp_lambda, list(range(depth, -1, -1)), unit, length)


def _curriculum(
    depth: int,
    mtp_lambda: float | Sequence[float],
    active: list[int],
    unit: str,
    length: float | None,
) -> Piecewise:
    base = base_weights(depth, mtp_lambda)
    points = {
        stage / (depth + 1): [base[k] if k < count else 0.0 for k in range(depth)]
        for stage, count in enumerate(active)
    }
    return Piecewise.from_weights(depth, scaled(points, unit, length), unit, "step")

"""The schedules of published models, as multiples of ``mtp_lambda``.

``length`` is the schedule's whole length in ``unit``: the published positions are fractions of a
run, so they need it in another unit (deepseek_v3 with unit=tokens, length=14.8e12 switches at
10e12).
"""

from __future__ import annotations

from collections.abc import Sequence

from mtp_lightning.errors import UserError
from mtp_lightning.objective.schedule.piecewise import Piecewise, scaled
from mtp_lightning.settings import require_number, require_whole


def constant(
    depth: int,
    mtp_lambda: float | Sequence[float],
    unit: str = "fraction",
    length: float | None = None,
) -> Piecewise:
    """`mtp_lambda` from the beginning to the end. The unit changes nothing; it is taken (and
    checked) so that a sweep over presets can set it for all of them."""
    return Piecewise(depth, mtp_lambda, scaled({0: 1}, unit, length), unit, "step")


def deepseek_v3(
    depth: int,
    mtp_lambda: float | Sequence[float],
    unit: str = "fraction",
    length: float | None = None,
) -> Piecewise:
    """0.3 for the first 10T of 14.8T tokens, then 0.1 (DeepSeek-V3 report, section 4.2), in
    multiples."""
    return Piecewise(
        depth, mtp_lambda, scaled({0: 1, 10 / 14.8: 1 / 3}, unit, length), unit, "step"
    )


def linear_decay(
    depth: int,
    mtp_lambda: float | Sequence[float],
    unit: str = "fraction",
    length: float | None = None,
) -> Piecewise:
    """Falls linearly from `mtp_lambda` to a third of it."""
    return Piecewise(depth, mtp_lambda, scaled({0: 1, 1: 1 / 3}, unit, length), unit, "linear")


def geometric(
    depth: int,
    mtp_lambda: float | Sequence[float],
    beta: float = 0.6,
    unit: str = "fraction",
    length: float | None = None,
) -> Piecewise:
    """Depth k has the weight ``mtp_lambda * beta^k / sum_j beta^j`` (FastMTP, 2025)."""
    require_number("lambda_schedule.beta", beta, above=0)
    require_whole("mtp.depth", depth, least=0)
    powers = [float(beta) ** k for k in range(1, depth + 1)]
    total = sum(powers)
    knots: dict[float, list[float]] = {0: [power / total for power in powers]}
    return Piecewise(depth, mtp_lambda, scaled(knots, unit, length), unit, "step")


def modded_nanogpt(
    depth: int,
    mtp_lambda: float | Sequence[float],
    unit: str = "fraction",
    length: float | None = None,
) -> Piecewise:
    """Three equal stages for D = 2 (modded-nanogpt, 2025-12-22): [.5, .25] -> [.5, 0] -> [0, 0],
    then nothing; these are the weights at ``mtp_lambda=0.3``, kept as multiples of it."""
    if depth != 2:
        raise UserError(
            f"lambda_schedule=modded_nanogpt is written for mtp.depth=2, but mtp.depth={depth}: "
            "set mtp.depth=2 or choose another lambda_schedule."
        )
    knots = {0: [0.5 / 0.3, 0.25 / 0.3], 1 / 3: [0.5 / 0.3, 0.0], 2 / 3: [0.0, 0.0]}
    return Piecewise(depth, mtp_lambda, scaled(knots, unit, length), unit, "linear")

"""Piecewise schedules from knots, progress -> weight: the general form of all published ones.

With one number ``mtp_lambda`` every depth gets ``mtp_lambda / D`` (DeepSeek-V3 report, eq. 25),
with a list depth k gets ``mtp_lambda[k]``. Knots are written as multiples of ``mtp_lambda``, so
that a sweep over ``mtp_lambda`` works under every preset.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.objective.schedule.base import LambdaSchedule, Progress
from mtp_lightning.settings import is_number, require_choice, require_number, require_whole

UNITS = ("fraction", "steps", "tokens")
INTERPOLATIONS = ("step", "linear", "cosine")


class Piecewise(LambdaSchedule):
    """Piecewise weights of the MTP depths.

    Each knot is first turned into weights per depth; then the weights of adjacent knots are
    interpolated. The first knot also holds before its position, and the last one after it.

    Args:
        depth: D, the number of MTP depths (0 gives no weights).
        mtp_lambda: one number, or a list of D numbers.
        knots: progress -> multiple of `mtp_lambda`. One number m means ``m * mtp_lambda / D`` for
            every depth (``m * mtp_lambda[k]`` with a list); a list of D multiples means ``m_k *
            mtp_lambda`` (``m_k * mtp_lambda[k]``), without division by D. None is ``{0: 1}``:
            constant.
        unit: what the knots' keys count: `fraction` of the run in [0, 1], optimizer `steps`, or
            `tokens`.
        interpolation: `step` (a knot's weights hold until the next knot), `linear` or `cosine`.

    Raises:
        UserError: on lists of another length than D, negative or non-finite weights, keys out of
            range, or an unknown unit or interpolation.
    """

    def __init__(
        self,
        depth: int,
        mtp_lambda: float | Sequence[float],
        knots: Mapping[float, float | Sequence[float]] | None = None,
        unit: str = "fraction",
        interpolation: str = "linear",
    ) -> None:
        super().__init__(depth)
        weights, shares = _weights(depth, mtp_lambda)
        require_choice("lambda_schedule.unit", unit, UNITS)
        require_choice("lambda_schedule.interpolation", interpolation, INTERPOLATIONS)
        knots = {0: 1.0} if knots is None else knots
        if not isinstance(knots, Mapping) or not knots:
            raise UserError(
                "lambda_schedule.knots must map progress to multiples, like "
                f"'{{0: 1, 0.5: [0.3, 0.1]}}', not {knots!r}."
            )
        most = 1 if unit == "fraction" else None
        for position in knots:
            key = f"A key of lambda_schedule.knots (in unit={unit})"
            require_number(key, position, least=0, most=most)
        self.unit, self.interpolation = unit, interpolation
        points = sorted(knots.items(), key=lambda point: point[0])
        self.positions = tuple(float(position) for position, _ in points)
        self.knot_weights = tuple(_knot(*point, weights, shares) for point in points)

    @property
    def moves(self) -> bool:
        return len(set(self.knot_weights)) > 1

    @property
    def depth_ever_skipped(self) -> bool:
        return any(weight == 0.0 for values in self.knot_weights for weight in values)

    def lambdas(self, progress: Progress) -> list[float]:
        """The D effective multipliers of L_1 .. L_D at this progress."""
        reached = {"steps": progress.step, "tokens": progress.tokens}
        position = reached.get(self.unit, progress.fraction)
        if position <= self.positions[0]:
            return list(self.knot_weights[0])
        if position >= self.positions[-1]:
            return list(self.knot_weights[-1])
        upper = bisect.bisect_right(self.positions, position)
        before, after = self.knot_weights[upper - 1], self.knot_weights[upper]
        if self.interpolation == "step":
            return list(before)
        start, end = self.positions[upper - 1], self.positions[upper]
        share = (position - start) / (end - start)
        if self.interpolation == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return [_between(a, b, share) for a, b in zip(before, after, strict=True)]


def preset(
    knots: Callable[..., Mapping[float, Any]], interpolation: str = "step", *, shared: bool = False
) -> Callable[..., Piecewise]:
    """A schedule from its knots: D and settings of its own -> fraction -> multiples.

    With ``shared``, multiples for every depth share one ``mtp_lambda``, as a single one does.
    """

    def schedule(
        depth: int,
        mtp_lambda: float | Sequence[float],
        unit: str = "fraction",
        length: float | None = None,
        **settings: Any,
    ) -> Piecewise:
        require_whole("mtp.depth", depth, least=0)
        if shared:
            weights, shares = _weights(depth, mtp_lambda)
            mtp_lambda = [weight / shares for weight in weights]
        points = scaled(knots(depth, **settings), unit, length)
        return Piecewise(depth, mtp_lambda, points, unit, interpolation)

    return schedule


def scaled(knots: Mapping[float, Any], unit: str, length: float | None) -> dict[float, Any]:
    """Move a preset's knots from fractions of a run into `unit`."""
    require_choice("lambda_schedule.unit", unit, UNITS)
    if unit == "fraction" and length is not None:
        raise UserError(
            f"lambda_schedule.length={length} has no meaning with unit=fraction (the run's length "
            "is trainer.max_steps): drop it, or set lambda_schedule.unit=steps or tokens."
        )
    if unit == "fraction" or (len(knots) == 1 and length is None):
        return dict(knots)
    if length is None or not is_number(length) or length <= 0:
        raise UserError(
            f"With unit={unit} a preset needs lambda_schedule.length, its whole length in {unit} "
            f"(a number > 0), not {length!r}."
        )
    # rounded, so that a third of 300 steps is step 100 and not one ulp after it
    return {round(position * length, 6): value for position, value in knots.items()}


def _between(before: float, after: float, share: float) -> float:
    """Interpolate without leaving [before, after] by rounding; equal ends give exactly that
    value."""
    if before == after:
        return before
    low, high = min(before, after), max(before, after)
    return min(max(before + (after - before) * share, low), high)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _weight(value: Any, key: str) -> float:
    return float(require_number(key, value, least=0))


def _weight_list(values: Any, key: str, depth: int) -> list[float]:
    if len(values) != depth:
        raise UserError(
            f"{key} is a list of {len(values)} numbers ({list(values)}), but mtp.depth is "
            f"{depth}: give {depth} numbers, or one number for all depths."
        )
    return [_weight(value, f"{key}, entry {i + 1},") for i, value in enumerate(values)]


def _weights(depth: int, mtp_lambda: float | Sequence[float]) -> tuple[list[float], int]:
    """The weight of every depth alone, and how many shares a multiple for all depths is divided
    into: D with one number."""
    require_whole("mtp.depth", depth, least=0)
    if _is_list(mtp_lambda):
        return _weight_list(mtp_lambda, "mtp_lambda", depth), 1
    return [_weight(mtp_lambda, "mtp_lambda")] * depth, max(depth, 1)


def _knot(position: float, value: Any, weights: Sequence[float], shares: int) -> tuple[float, ...]:
    """One knot's multiples as D effective weights."""
    key = f"The knot at {position:g} of lambda_schedule.knots"
    if _is_list(value):
        multiples = _weight_list(value, key, len(weights))
        return tuple(m * weight for m, weight in zip(multiples, weights, strict=True))
    multiple = _weight(value, key)
    return tuple(multiple * weight / shares for weight in weights)

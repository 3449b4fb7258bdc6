"""The schedules of published models, as multiples of ``mtp_lambda``.

Positions are fractions of the schedule's ``length``, which is the run for ``unit=fraction``:
deepseek_v3 with unit=tokens, length=14.8e12 switches at 10e12.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.objective.schedule.piecewise import preset
from mtp_lightning.settings import require_number


def _geometric(depth: int, beta: float = 0.6) -> Mapping[float, Any]:
    require_number("lambda_schedule.beta", beta, above=0)
    powers = [float(beta) ** k for k in range(1, depth + 1)]
    return {0: [power / sum(powers) for power in powers]}


def _modded_nanogpt(depth: int) -> Mapping[float, Any]:
    if depth != 2:
        raise UserError(
            f"lambda_schedule=modded_nanogpt is written for mtp.depth=2, but mtp.depth={depth}: "
            "set mtp.depth=2 or choose another lambda_schedule."
        )
    # The published weights, which are those at mtp_lambda=0.3.
    return {0: [0.5 / 0.3, 0.25 / 0.3], 1 / 3: [0.5 / 0.3, 0.0], 2 / 3: [0.0, 0.0]}


# mtp_lambda from the first step to the last. The unit changes nothing: it is accepted so that a
# sweep over presets can set it for all of them.
constant = preset(lambda depth: {0: 1})
# 0.3 for the first 10T of 14.8T tokens, then 0.1 (DeepSeek-V3 report, section 4.2).
deepseek_v3 = preset(lambda depth: {0: 1, 10 / 14.8: 1 / 3})
# From mtp_lambda to a third of it.
linear_decay = preset(lambda depth: {0: 1, 1: 1 / 3}, "linear")
# Depth k has the weight mtp_lambda * beta^k / sum_j beta^j (FastMTP, 2025).
geometric = preset(_geometric)
# Three equal stages for D = 2 (2025-12-22): [.5, .25] -> [.5, 0] -> [0, 0], then nothing.
modded_nanogpt = preset(_modded_nanogpt, "linear")

"""How much a position of a depth counts beside the others (``objective.weights``).

Weights multiply the losses, and the sum is divided by the number of positions as ever: they are not
normalised, and a step is the same however it is split.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class PositionWeights(ABC):
    """A rule.

    Attributes:
        needs_target_probs: whether ``q^k(x)`` of all depths must be known beforehand.
    """

    needs_target_probs: ClassVar[bool] = False

    @abstractmethod
    def of_depths(
        self, valid: Mapping[int, Tensor], target_probs: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """Depth -> weights [B, T], without a gradient.

        Args:
            valid: depth -> bool [B, T], where it counts; in the order of depths.
            target_probs: depth -> ``q^k(x)`` [B, T]; empty unless asked for.
        """


@dataclass(frozen=True)
class ExpDecay(PositionWeights):
    """``exp(-(k - 1) / g)`` for depth k."""

    g: float

    def of_depths(
        self, valid: Mapping[int, Tensor], target_probs: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        return {
            k: torch.full_like(valid_BT, math.exp(-(k - 1) / self.g), dtype=torch.float32)
            for k, valid_BT in valid.items()
        }


@dataclass(frozen=True)
class Acceptance(PositionWeights):
    """D-PACE (arXiv 2605.18810): a draft matters as much as there are drafts that need it.

    ``s_k = (1 - a) q^k(x) + a``, ``P_k = prod_{i<=k} s_i``, and depth k weighs ``sg sum_{i>=k}
    P_i``, over the depths that count at the position.
    """

    needs_target_probs = True
    a: float

    def of_depths(
        self, valid: Mapping[int, Tensor], target_probs: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        reached, product = {}, None
        for k, q_BT in target_probs.items():
            s_BT = torch.where(valid[k], (1 - self.a) * q_BT + self.a, 1)
            product = s_BT if product is None else product * s_BT
            reached[k] = product * valid[k]
        weights: dict[int, Tensor] = {}
        deeper = None
        for k in reversed(reached):
            deeper = reached[k] if deeper is None else deeper + reached[k]
            weights[k] = deeper
        return weights

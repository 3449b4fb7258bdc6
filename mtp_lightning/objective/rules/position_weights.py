"""Weights of positions (``objective.weights``).

Weights multiply the losses, and the sum is still divided by the number of positions: weights are
not normalized, so a step does not depend on how it is split into micro-batches.

Shapes: B batch, T positions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX
from mtp_lightning.objective.rules.base import ByDepth, Measures, PositionMeasure, Rule
from mtp_lightning.objective.targets import DepthTarget, tokens_of
from mtp_lightning.objective.terms.base import Chunk
from mtp_lightning.settings import require_number


class TargetProb(PositionMeasure):
    """``q^k(x)``, a depth's probability of its target."""

    name = "target_prob"

    def value(self, chunk: Chunk) -> Tensor:
        return chunk.log_probs_RV.exp().gather(1, chunk.targets_R.unsqueeze(-1)).squeeze(-1)


class PositionWeights(Rule):
    """A rule that multiplies losses and gradients of every depth's positions."""

    def apply(self, targets: Sequence[DepthTarget], values: Measures) -> list[DepthTarget]:
        tokens = tokens_of(targets)
        valid = {k: tokens_BT != IGNORE_INDEX for k, tokens_BT in tokens.items() if k}
        weights = self.depth_weights(valid, values.get(TargetProb.name, {}))
        return [
            replace(t, weights=weights[t.depth]) if t.depth and t.term.follows_weights else t
            for t in targets
        ]

    @abstractmethod
    def depth_weights(self, valid: ByDepth, target_probs: ByDepth) -> dict[int, Tensor]:
        """The weights of every depth, without a gradient.

        Args:
            valid: bool, where the depth counts; in the order of depths.
            target_probs: ``q^k(x)``; empty unless :class:`TargetProb` is measured.
        """


class ExpDecay(PositionWeights):
    """``exp(-(k - 1) / g)`` for depth k, with g = ``decay``, in depths."""

    setting = "objective.weights=exp_decay"
    of_drafts = False

    def __init__(self, decay: float = 4.0) -> None:
        self.g = require_number("objective.decay", decay, above=0)

    def depth_weights(self, valid: ByDepth, target_probs: ByDepth) -> dict[int, Tensor]:
        return {
            k: torch.full_like(valid_BT, math.exp(-(k - 1) / self.g), dtype=torch.float32)
            for k, valid_BT in valid.items()
        }


class Acceptance(PositionWeights):
    """D-PACE (arXiv 2605.18810): a draft is weighted by the expected number of accepted drafts that
    depend on it.

    ``s_k = (1 - a) q^k(x) + a`` with a = ``smoothing``, ``P_k = prod_{i<=k} s_i``, and depth k has
    the weight ``sg sum_{i>=k} P_i``, over the depths that count at the position.
    """

    setting = "objective.weights=acceptance"
    measures = (TargetProb(),)

    def __init__(self, smoothing: float = 0.5) -> None:
        self.a = require_number("objective.smoothing", smoothing, least=0, most=1)

    def depth_weights(self, valid: ByDepth, target_probs: ByDepth) -> dict[int, Tensor]:
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

"""Depths do not learn to predict across unpredictable tokens (AdaMTP, arXiv 2608.00434).

With ``H_s`` the entropy of the main prediction at position s, depth k at t counts only if there is
no jump ``H_{s+1} - H_s > tau`` in t .. t + k + 1. Positions beyond the window count as no jump.

Shapes: B batch, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX
from mtp_lightning.errors import UserError
from mtp_lightning.objective.ranks import sum_over_ranks
from mtp_lightning.objective.rules.base import Measures, PositionMeasure, Rule
from mtp_lightning.objective.targets import DepthTarget, tokens_of
from mtp_lightning.objective.terms.base import Chunk
from mtp_lightning.settings import require_number

# Changes of entropy are counted in bins of 1/16 nat; they are smaller than ln V.
_BINS, _REACH = 512, 16.0
_DECAY = 0.99  # of the counts, per optimizer step


class Entropy(PositionMeasure):
    """Entropy of the main prediction, in nats."""

    name = "entropy"
    of_main = True

    def value(self, chunk: Chunk) -> Tensor:
        return -(chunk.log_probs_RV.exp() * chunk.log_probs_RV).sum(-1)


class EntropyMask(Rule):
    """``objective.mask=entropy``.

    The running quantile is taken over earlier optimizer steps, whose counts decay exponentially; it
    is infinite before the first step. Changes of entropy are counted in bins, so that tau does not
    depend on the number of ranks or micro-batches, or on interruptions of the run.

    Args:
        tau: threshold of a jump, in nats; None for the running quantile.
        quantile: share of the changes between adjacent positions that are not jumps; None for 0.95.

    Raises:
        UserError: tau is not a number, the quantile is outside of (0, 1), or both are given.
    """

    setting = "objective.mask=entropy"
    measures = (Entropy(),)

    def __init__(self, tau: float | None = None, quantile: float | None = None) -> None:
        if tau is not None and tau != math.inf:
            require_number("objective.tau (null for a running quantile)", tau)
        if tau is not None and quantile is not None:
            raise UserError(
                f"objective.tau={tau} and objective.quantile={quantile} both set the threshold of "
                "a jump: leave one of them null."
            )
        self.fixed = tau
        quantile = 0.95 if quantile is None else quantile
        self.quantile = require_number("objective.quantile", quantile, above=0, below=1)
        self._counts = torch.zeros(_BINS, dtype=torch.float64)
        # Of the current step: counts of changes by bin, then for every depth the number of its
        # valid positions and of those that count.
        self._pending: Tensor | None = None

    @property
    def tau(self) -> float:
        """The threshold of a jump, in nats."""
        if self.fixed is not None:
            return self.fixed
        total = float(self._counts.sum())
        if total == 0:
            return math.inf
        below = self._counts.cumsum(0)
        bin_ = int(torch.searchsorted(below, self.quantile * total))
        return (min(bin_, _BINS - 1) + 1) * 2 * _REACH / _BINS - _REACH

    def apply(self, targets: Sequence[DepthTarget], values: Measures) -> list[DepthTarget]:
        masks = self.keep_masks(values["entropy"][0], tokens_of(targets))
        return [
            replace(t, tokens=t.tokens.masked_fill(~masks[t.depth], IGNORE_INDEX))
            if t.depth and t.term.follows_mask
            else t
            for t in targets
        ]

    def keep_masks(self, entropy_BT: Tensor, tokens: dict[int, Tensor]) -> dict[int, Tensor]:
        """Depth -> bool [B, T], whether the depth counts at a position, from the main prediction's
        entropy and the targets [B, T] of all depths, the main prediction's at 0; -100 is ignored.
        """
        jump_BT = torch.zeros_like(entropy_BT, dtype=torch.bool)
        change_BT = entropy_BT[:, 1:] - entropy_BT[:, :-1]
        jump_BT[:, :-1] = change_BT > self.tau
        masks = {}
        for k in tokens:
            if k:
                broken_BT = jump_BT.clone()
                for ahead in range(1, min(k, jump_BT.shape[1] - 1) + 1):
                    broken_BT[:, :-ahead] |= jump_BT[:, ahead:]
                masks[k] = ~broken_BT
        self._count(change_BT[tokens[0][:, :-1] >= 0], masks, tokens)
        return masks

    def _count(self, changes: Tensor, masks: dict[int, Tensor], tokens: dict[int, Tensor]) -> None:
        bins = ((changes + _REACH) * (_BINS / (2 * _REACH))).long().clamp_(0, _BINS - 1)
        counts = torch.zeros(_BINS + 2 * (max(tokens) + 1), dtype=torch.int64, device=bins.device)
        counts[:_BINS] = torch.bincount(bins, minlength=_BINS)
        for k, mask_BT in masks.items():
            valid_BT = tokens[k] >= 0
            counts[_BINS + 2 * k] = valid_BT.sum()
            counts[_BINS + 2 * k + 1] = (valid_BT & mask_BT).sum()
        self._pending = counts if self._pending is None else self._pending + counts

    def after_backward(self) -> dict[str, float]:
        if self._pending is None:
            return {}
        tau = self.tau
        counts = sum_over_ranks(self._pending).cpu()
        self._pending = None
        self._counts = _DECAY * self._counts + counts[:_BINS].double()
        valid, kept = counts[_BINS::2].tolist(), counts[_BINS + 1 :: 2].tolist()
        values = {f"objective/kept_depth_{k}": kept[k] / n for k, n in enumerate(valid) if n}
        return values | ({"objective/tau": tau} if math.isfinite(tau) else {})

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "counts" in state:
            self._counts = torch.tensor(state["counts"], dtype=torch.float64)

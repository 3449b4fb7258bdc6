"""Coupling of terms whose loss of a depth depends on the other depths at the same position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX
from mtp_lightning.objective.rules.base import Measure, Rule, Seen
from mtp_lightning.objective.targets import DepthTarget
from mtp_lightning.objective.terms.base import Chunk
from mtp_lightning.objective.terms.tv import acceptance


class Alpha(Measure):
    """``sum_v min(p_{t+k}, q^k_t)``, the expected acceptance of depth k."""

    name = "alpha"
    needs_teacher = True

    def value(self, chunk: Chunk) -> Tensor:
        return acceptance(chunk.teacher.probs_RV, chunk.log_probs_RV.exp())


class Coupling(Rule):
    """Computes the losses and gradient scales of a term with ``couples`` from all depths together.

    Args:
        term: the term; only its targets are changed.
        asked: the setting that selects it.
    """

    measures = (Alpha(),)

    def __init__(self, term: Any, asked: str) -> None:
        self.term, self.asked = term, asked

    def apply(self, targets: Sequence[DepthTarget], seen: Seen) -> list[DepthTarget]:
        own = {t.depth: t for t in targets if t.term is self.term}
        if not own:
            return list(targets)
        alpha = {k: seen["alpha"][k] for k in own}
        valid = {k: t.tokens != IGNORE_INDEX for k, t in own.items()}
        weights = {
            k: torch.ones_like(alpha[k]) if t.weights is None else t.weights.to(alpha[k].dtype)
            for k, t in own.items()
        }
        coefficients = {k: t.coefficient * weights[k] for k, t in own.items()}
        values, scales = self.term.together(alpha, valid, coefficients)
        settled = {
            k: replace(t, weights=scales[k] / t.coefficient, values=values[k] * weights[k])
            for k, t in own.items()
        }
        return [settled[t.depth] if t.term is self.term else t for t in targets]

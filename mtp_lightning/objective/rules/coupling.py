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


class Accepted(Measure):
    """How likely a depth's draft is accepted, as a term with ``couples`` says.

    Args:
        term: whose ``accepted`` is measured.
    """

    needs_teacher = True

    def __init__(self, term: Any) -> None:
        self.term, self.name = term, f"accepted by {term.name}"  # type: ignore[misc]

    def value(self, chunk: Chunk) -> Tensor:
        accepted_R: Tensor = self.term.accepted(chunk)
        return accepted_R


class Coupling(Rule):
    """Computes the losses and gradient scales of a term with ``couples`` from all depths together.

    Args:
        term: the term; only its targets are changed.
        asked: the setting that selects it.
    """

    def __init__(self, term: Any, asked: str) -> None:
        self.term, self.asked = term, asked
        self.measures = (Accepted(term),)

    def apply(self, targets: Sequence[DepthTarget], seen: Seen) -> list[DepthTarget]:
        own = {t.depth: t for t in targets if t.term is self.term}
        if not own:
            return list(targets)
        (measure,) = self.measures
        accepted = {k: seen[measure.name][k] for k in own}
        valid = {k: t.tokens != IGNORE_INDEX for k, t in own.items()}
        weights = {
            k: torch.ones_like(accepted[k])
            if t.weights is None
            else t.weights.to(accepted[k].dtype)
            for k, t in own.items()
        }
        coefficients = {k: t.coefficient * weights[k] for k, t in own.items()}
        values, scales = self.term.together(accepted, valid, coefficients)
        settled = {
            k: replace(t, weights=scales[k] / t.coefficient, values=values[k] * weights[k])
            for k, t in own.items()
        }
        return [settled[t.depth] if t.term is self.term else t for t in targets]

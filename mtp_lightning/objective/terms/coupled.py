"""Terms of all depths of a position together: a draft counts only if those before it do.

A subclass computes ``s_k`` in [0, 1], the probability that depth k's draft is accepted. Drafts
1 .. j are all accepted with probability ``prod_{i<=j} s_i``, and the loss of depth j is 1 minus
that product. It trains depth j and all shallower ones, and ``mtp_lambda`` weighs it like every
other loss. The losses of D depths sum to D minus the expected number of accepted drafts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX
from mtp_lightning.objective.rules.base import ByDepth, Measures, PositionMeasure, Rule
from mtp_lightning.objective.targets import DepthTarget
from mtp_lightning.objective.terms.base import Chunk, Term


class Coupled(Term):
    """A term whose gradient by a depth's logits is that of ``1 - s_k``, times the chance that the
    other drafts are accepted. These chances must be known before any depth learns, so the term
    brings a rule with a prepass (:class:`Coupling`)."""

    needs_teacher = True

    def rules(self, setting: str) -> Sequence[Rule]:
        return [Coupling(self, setting)]

    @abstractmethod
    def accepted(self, chunk: Chunk) -> Tensor:
        """``s_k`` of every position [R], differentiable by ``chunk.log_probs_RV``."""

    def value(self, chunk: Chunk) -> Tensor:
        return 1 - self.accepted(chunk)


class Accepted(PositionMeasure):
    """How likely a depth's draft is accepted, as its term says."""

    needs_teacher = True

    def __init__(self, term: Coupled) -> None:
        self.term, self.name = term, f"accepted by {term.name}"  # type: ignore[misc]

    def value(self, chunk: Chunk) -> Tensor:
        return self.term.accepted(chunk)


class Coupling(Rule):
    """Computes the losses and gradient scales of a coupled term from all depths together; targets
    of other terms stay as they are."""

    def __init__(self, term: Coupled, setting: str) -> None:
        self.term, self.setting = term, setting
        self.measures = (Accepted(term),)

    def apply(self, targets: Sequence[DepthTarget], values: Measures) -> list[DepthTarget]:
        coupled = {t.depth: t for t in targets if t.term is self.term}
        if not coupled:
            return list(targets)
        (measure,) = self.measures
        accepted = {k: values[measure.name][k] for k in coupled}
        valid = {k: t.tokens != IGNORE_INDEX for k, t in coupled.items()}
        weights = {
            k: torch.ones_like(accepted[k])
            if t.weights is None
            else t.weights.to(accepted[k].dtype)
            for k, t in coupled.items()
        }
        coefficients = {k: t.coefficient * weights[k] for k, t in coupled.items()}
        losses, scales = _together(accepted, valid, coefficients)
        replacements = {
            k: replace(t, weights=scales[k] / t.coefficient, values=losses[k] * weights[k])
            for k, t in coupled.items()
        }
        return [replacements[t.depth] if t.term is self.term else t for t in targets]


def _together(
    accepted: ByDepth, valid: ByDepth, coefficients: ByDepth
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The loss of every depth, and the factor of the gradient of ``1 - s_i``.

    A depth that does not count at a position has no draft there that could be rejected: its
    ``s`` is taken as 1.

    Args:
        accepted: ``s``, in the order of depths.
        valid: bool, where a depth counts.
        coefficients: the weight of a depth's loss at a position.

    Returns:
        depth j -> ``1 - prod_{i<=j} s_i`` [B, T]; depth i -> ``sum_{j>=i} coefficient_j
        prod_{l<=j, l!=i} s_l`` [B, T], over the depths j that count.
    """
    depths = list(accepted)
    chances = {k: torch.where(valid[k], accepted[k], 1) for k in depths}
    losses, scales = {}, {}
    product = torch.ones_like(accepted[depths[0]])
    for k in depths:
        product = product * chances[k]
        losses[k] = 1 - product
    for i in depths:
        # Without a division: an s may be 0.
        others_product, scales[i] = torch.ones_like(product), torch.zeros_like(product)
        for j in depths:
            others_product = others_product if j == i else others_product * chances[j]
            if j >= i:
                scales[i] = scales[i] + coefficients[j] * valid[j] * others_product
    return losses, scales

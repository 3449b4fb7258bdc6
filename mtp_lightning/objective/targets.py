"""The targets of the depths: tokens, a term, and the weight of every position.

Shapes: B batch, T positions, R positions of one chunk, C d_model, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.chunk import Chunk, Teacher
from mtp_lightning.objective.terms.base import Term


@dataclass(frozen=True, eq=False)
class DepthTarget:
    """The target of one depth for one term."""

    depth: int  # k
    tokens: Tensor  # [...] token ids; -100 is ignored
    # Factor of the term's summed loss: its weight / number of positions that count in the step. A
    # loss of coefficient 0 is at most logged.
    coefficient: float
    term: Term
    index: int = 0  # of the term in the objective
    # [...] weights of the positions, which multiply loss and gradient; None is 1.
    weights: Tensor | None = None
    # [...] the losses, if they depend on other depths and are known from a prepass; ``weights``
    # then multiply only the gradient.
    values: Tensor | None = None
    shift: int = 0  # how many positions to the right the main prediction of the same token is
    # [...] a tensor that receives the loss of every position; None for none.
    record: Tensor | None = None
    total: Tensor | None = None  # fp64 scalar that the summed loss is added to; None for none
    # [...] ids of the tokens before the targets; None unless the term reads them.
    before: Tensor | None = None


class ChunkTarget:
    """A target at the R positions of one chunk.

    Attributes:
        depth, shift, coefficient, term: those of the target.
        teacher: the teacher at these rows; None until it is known.
        tokens_R: target ids; 0 at positions that do not count.
        valid_R: bool, which positions have a target.
        counts_R: mask times weights.
    """

    def __init__(
        self, target: DepthTarget, rows: slice | Tensor, teacher: Teacher | None = None
    ) -> None:
        self.depth, self.shift = target.depth, target.shift
        self.coefficient, self.term = target.coefficient, target.term
        tokens_R = target.tokens.reshape(-1)[rows]
        self.tokens_R, self.valid_R = tokens_R.clamp(min=0), tokens_R != IGNORE_INDEX
        weights_R, self._values_R, self._before_R = (
            None if field is None else field.reshape(-1)[rows]
            for field in (target.weights, target.values, target.before)
        )
        self.counts_R = self.valid_R if weights_R is None else weights_R * self.valid_R
        self.teacher = teacher
        self._record, self._rows, self._total = target.record, rows, target.total

    def scale_R1(self, dtype: torch.dtype) -> Tensor:
        """Mask, weights and coefficient."""
        return (self.counts_R.to(dtype) * self.coefficient).unsqueeze(-1)

    def chunk(self, log_q_RV: Tensor, h_RC: Tensor | None = None) -> Chunk:
        """The argument of the term's methods."""
        return Chunk(self.depth, log_q_RV, self.tokens_R, h_RC, self.teacher, self._before_R)

    def value(self, log_q_RV: Tensor, h_RC: Tensor | None = None) -> Tensor:
        """The term's loss at every position [R]."""
        return self.term.value(self.chunk(log_q_RV, h_RC))

    def add_to_total(self, value_R: Tensor, counts_R: Tensor | None = None) -> None:
        """Add the losses to the total, weighted by ``counts_R`` (default: mask times weights)."""
        if value_R.shape != self.valid_R.shape:
            raise UserError(
                f"the loss of depth {self.depth} has the shape {list(value_R.shape)} for "
                f"{len(self.valid_R)} positions: return one number for each position."
            )
        if self._record is not None:
            self._record.view(-1)[self._rows] = value_R
        counts_R = self.counts_R if counts_R is None else counts_R
        if self._values_R is not None:
            value_R, counts_R = self._values_R, self.valid_R
        if self._total is not None:
            self._total += (value_R * counts_R).double().sum()


def by_depth(targets: Sequence[DepthTarget]) -> dict[int, list[DepthTarget]]:
    """Group targets by depth, in their order."""
    groups = itertools.groupby(targets, key=lambda target: target.depth)
    return {depth: list(group) for depth, group in groups}


def tokens_of(targets: Sequence[DepthTarget]) -> dict[int, Tensor]:
    """The target tokens of every depth: those of a term without a teacher if there is one, since a
    teacher is missing at the window's last positions. Terms that count padding are skipped."""
    tokens: dict[int, Tensor] = {}
    for target in (target for target in targets if not target.term.counts_padding):
        if target.depth not in tokens or not target.term.needs_teacher:
            tokens[target.depth] = target.tokens
    return tokens

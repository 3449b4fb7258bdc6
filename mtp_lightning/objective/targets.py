"""What the depths are asked for: tokens, a term, and how much every position counts.

Shapes: B batch, T positions, R positions of one chunk, C d_model, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX, WindowBatch
from mtp_lightning.mtp.base import MTPStack, RandomKey
from mtp_lightning.objective.ranks import sum_over_ranks, world_size
from mtp_lightning.objective.terms.base import Chunk, Teacher, Term


@dataclass(frozen=True, eq=False)
class DepthTarget:
    """What one depth is to predict by one term, and how much it counts.

    Attributes:
        depth: k.
        tokens: [...] token ids; -100 is ignored.
        coefficient: factor of the term's summed loss: its weight / positions that count in the
            step. A loss of factor 0 that nothing learns from is not computed.
        term: what it is trained on.
        part: which of the objective's terms that is.
        weights: [...] of the positions, which multiply loss and gradient; None is 1.
        values: [...] the losses, where they are known beforehand and rest on other depths, too;
            ``weights`` then multiply the gradient alone.
        stride: s, of depths that leap: the main prediction of the same token stands s k positions
            on.
        record: [...] where the losses of the positions are written, if anywhere.
    """

    depth: int
    tokens: Tensor
    coefficient: float
    term: Term
    part: int = 0
    weights: Tensor | None = None
    values: Tensor | None = None
    stride: int = 1
    record: Tensor | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether the term compares with the main prediction."""
        return self.term.needs_teacher


class ChunkTarget:
    """A target at some positions: token ids [R], and how much each of them counts [R].

    Args:
        target: of all positions.
        rows: which of them these are.
        total: fp64 scalar that the losses are added to.
    """

    def __init__(self, target: DepthTarget, rows: slice | Tensor, total: Tensor) -> None:
        tokens_R = target.tokens.reshape(-1)[rows]
        self.depth, self.coefficient, self.term = target.depth, target.coefficient, target.term
        self.of_token = target.term.of_token
        self.tokens_R, self.valid_R = tokens_R.clamp(min=0), tokens_R != IGNORE_INDEX
        # Mask and weights.
        self.counts_R = self.valid_R
        if target.weights is not None:
            self.counts_R = target.weights.reshape(-1)[rows] * self.valid_R
        self.teacher: Teacher | None = None
        self._values_R = None if target.values is None else target.values.reshape(-1)[rows]
        self._record, self._rows, self._total = target.record, rows, total

    def scale_R1(self, dtype: torch.dtype) -> Tensor:
        """Mask, weights and coefficient."""
        return (self.counts_R.to(dtype) * self.coefficient).unsqueeze(-1)

    def chunk(self, log_q_RV: Tensor, h_RC: Tensor | None = None) -> Chunk:
        """What the term is given."""
        return Chunk(self.depth, log_q_RV, self.tokens_R, h_RC, self.teacher)

    def value(self, log_q_RV: Tensor, h_RC: Tensor | None = None) -> Tensor:
        """The term's loss at every position [R]."""
        return self.term.value(self.chunk(log_q_RV, h_RC))

    def note(self, value_R: Tensor, counts_R: Tensor | None = None) -> None:
        """Add the losses to the sum: by mask and weights, or by ``counts_R`` in their place."""
        if self._record is not None:
            self._record.view(-1)[self._rows] = value_R
        counts_R = self.counts_R if counts_R is None else counts_R
        if self._values_R is not None:
            value_R, counts_R = self._values_R, self.valid_R
        self._total += (value_R * counts_R).double().sum()


def by_depth(targets: Sequence[DepthTarget]) -> dict[int, list[DepthTarget]]:
    """The targets of every depth, in their order."""
    groups = itertools.groupby(targets, key=lambda target: target.depth)
    return {depth: list(group) for depth, group in groups}


def tokens_of(targets: Sequence[DepthTarget]) -> dict[int, Tensor]:
    """The target tokens of every depth, -100 where none of its terms counts."""
    tokens: dict[int, Tensor] = {}
    for target in targets:
        if target.depth not in tokens or not target.needs_teacher:
            tokens[target.depth] = target.tokens
    return tokens


@dataclass(frozen=True)
class PositionCounts:
    """Positions that count in an optimizer step, of all ranks.

    Attributes:
        valid: [D + 1], those with a valid target.
        taught: [D + 1], those of them that have a teacher; None where nobody asks.
    """

    valid: list[int]
    taught: list[int] | None = None

    def of(self, k: int, term: Term) -> int:
        """Those of depth ``k`` that count for a term."""
        if not term.needs_teacher:
            return self.valid[k]
        assert self.taught is not None
        return self.taught[k]


def step_counts(
    batch: WindowBatch, stack: MTPStack, key: RandomKey | None = None, *, taught: bool = False
) -> PositionCounts:
    """Positions of every depth that count in the whole step, all ranks together.

    Args:
        batch: this rank's; every rank's has the same size.
        stack: that is trained.
        key: of its random choices in training.
        taught: whether those with a teacher are to be counted, too.
    """
    if batch.every_target_counts:  # known without looking: every rank's batch has the same size
        windows, depths = len(batch) * world_size(), range(batch.depth + 1)
        seen = [windows * max(batch.seq_len - batch.stride * k, 0) for k in depths]
        valid = [windows * batch.seq_len for _ in depths]
        return PositionCounts(valid, seen if taught else None)
    masked = batch.host or batch  # a GPU need not be waited for
    masks = [stack.valid(k, masked, key) for k in range(batch.depth + 1)]
    counts_K = torch.stack([mask.sum() for mask in masks if mask is not None])
    counts_NK = torch.stack([counts_K, *([count_taught(masked)] if taught else [])])
    if world_size() > 1:  # ranks speak by their devices
        counts_NK = sum_over_ranks(counts_NK.to(batch.device))
    return PositionCounts(*counts_NK.tolist())


def taught_targets(batch: WindowBatch, k: int) -> Tensor:
    """``[B, T]`` targets of depth k, -100 also where the main prediction of the same token lies
    beyond the window: at the last k positions, with a stride the last s k."""
    targets_BT = batch.targets(k).clone()
    targets_BT[:, max(batch.seq_len - batch.stride * k, 0) :] = IGNORE_INDEX
    return targets_BT


def count_taught(batch: WindowBatch) -> Tensor:
    """``[D + 1]`` int64 number of positions of every depth that have a teacher, and count."""
    targets = [taught_targets(batch, k) for k in range(batch.depth + 1)]
    return torch.stack([(tokens_BT != IGNORE_INDEX).sum() for tokens_BT in targets])

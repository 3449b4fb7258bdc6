"""The targets of the depths: tokens, a term, and the weight of every position.

Shapes: B batch, T positions, R positions of one chunk, C d_model, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX, WindowBatch
from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.mtp.inputs import RandomKey
from mtp_lightning.objective.ranks import sum_over_ranks, world_size
from mtp_lightning.objective.terms.base import Chunk, Teacher, Term


@dataclass(frozen=True, eq=False)
class DepthTarget:
    """The target of one depth for one term.

    Attributes:
        depth: k.
        tokens: [...] token ids; -100 is ignored.
        coefficient: factor of the term's summed loss: its weight / number of positions that count
            in the step. A loss of coefficient 0 is at most logged.
        term: the term.
        index: of the term in the objective.
        weights: [...] weights of the positions, which multiply loss and gradient; None is 1.
        values: [...] the losses, if they depend on other depths and are known from a prepass;
            ``weights`` then multiply only the gradient.
        stride: s; the main prediction of the same token is s k positions to the right.
        record: [...] a tensor that receives the loss of every position; None for none.
        total: fp64 scalar that the summed loss is added to; None for none.
        before: [...] ids of the tokens before the targets; None unless the term reads them.
    """

    depth: int
    tokens: Tensor
    coefficient: float
    term: Term
    index: int = 0
    weights: Tensor | None = None
    values: Tensor | None = None
    stride: int = 1
    record: Tensor | None = None
    total: Tensor | None = None
    before: Tensor | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether the term compares with the main prediction."""
        return self.term.needs_teacher


class ChunkTarget:
    """A target at the R positions of one chunk.

    Args:
        target: the target at all positions.
        rows: the chunk's rows.

    Attributes:
        tokens_R: target ids; 0 at positions that do not count.
        valid_R: bool, which positions have a target.
        counts_R: mask times weights.
    """

    def __init__(self, target: DepthTarget, rows: slice | Tensor) -> None:
        tokens_R = target.tokens.reshape(-1)[rows]
        self.depth, self.coefficient, self.term = target.depth, target.coefficient, target.term
        self.of_token = target.term.of_token
        self.tokens_R, self.valid_R = tokens_R.clamp(min=0), tokens_R != IGNORE_INDEX
        self.counts_R = self.valid_R
        if target.weights is not None:
            self.counts_R = target.weights.reshape(-1)[rows] * self.valid_R
        self.teacher: Teacher | None = None
        self._values_R = None if target.values is None else target.values.reshape(-1)[rows]
        self._before_R = None if target.before is None else target.before.reshape(-1)[rows]
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

    def note(self, value_R: Tensor, counts_R: Tensor | None = None) -> None:
        """Add the losses to the total, weighted by ``counts_R`` (default: mask times weights)."""
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
    """The target tokens of every depth; -100 at positions that count for none of its terms, apart
    from padding."""
    tokens: dict[int, Tensor] = {}
    for target in (target for target in targets if not target.term.counts_padding):
        if target.depth not in tokens or not target.needs_teacher:
            tokens[target.depth] = target.tokens
    return tokens


@dataclass(frozen=True)
class PositionCounts:
    """Number of positions that count in an optimizer step, over all ranks.

    Attributes:
        valid: [D + 1], positions with a valid target.
        taught: [D + 1], those of them that have a teacher; None if not needed.
        every: all positions; None if not needed.
    """

    valid: list[int]
    taught: list[int] | None = None
    every: int | None = None

    def of(self, k: int, term: Term) -> int:
        """Number of positions of depth ``k`` that count for a term."""
        if term.counts_padding:
            assert self.every is not None
            return self.every
        if not term.needs_teacher:
            return self.valid[k]
        assert self.taught is not None
        return self.taught[k]


def step_counts(
    stack: MTPStack, batch: WindowBatch, *, key: RandomKey | None = None, teachers: bool = False
) -> PositionCounts:
    """Count the positions of every depth that count in the whole step, over all ranks.

    Args:
        stack: the stack that is trained.
        batch: this rank's batch; all ranks' have the same size.
        key: key of the stack's random choices in training.
        teachers: whether to count the positions with a teacher too.
    """
    every = len(batch) * batch.seq_len * world_size()
    masked = batch.host or batch  # a copy on the host, which avoids waiting for a GPU
    masks = [stack.valid(k, masked, key) for k in range(batch.depth + 1)]
    if all(mask is None for mask in masks):
        # Known from the sizes, which are the same on all ranks.
        windows, depths = len(batch) * world_size(), range(batch.depth + 1)
        n_taught = [windows * max(batch.seq_len - batch.stride * k, 0) for k in depths]
        valid = [windows * batch.seq_len for _ in depths]
        return PositionCounts(valid, n_taught if teachers else None, every)
    whole = torch.tensor(masked.batch_size * masked.seq_len, device=masked.device)
    counts_K = torch.stack([whole if mask is None else mask.sum() for mask in masks])
    taught = [count_taught(stack, masked, key=key)] if teachers else []
    counts_NK = torch.stack([counts_K, *taught])
    if world_size() > 1:  # ranks communicate through their devices
        counts_NK = sum_over_ranks(counts_NK.to(batch.device))
    found: list[list[int]] = counts_NK.tolist()
    return PositionCounts(found[0], found[1] if teachers else None, every)


def targets_of(
    term: Term, stack: MTPStack, k: int, batch: WindowBatch, key: RandomKey | None = None
) -> Tensor:
    """``[B, T]`` targets of depth k for a term; -100 where it does not count."""
    if term.needs_teacher:
        return taught_targets(stack, k, batch, key)
    targets_BT = stack.targets(k, batch, key)
    return targets_BT.clamp(min=0) if term.counts_padding else targets_BT


def taught_targets(
    stack: MTPStack, k: int, batch: WindowBatch, key: RandomKey | None = None
) -> Tensor:
    """``[B, T]`` targets of depth k that have a teacher: -100 also at the last k positions (s k
    with a stride of s), whose teacher would lie beyond the window."""
    targets_BT = stack.targets(k, batch, key).clone()
    targets_BT[:, max(batch.seq_len - batch.stride * k, 0) :] = IGNORE_INDEX
    return targets_BT


def count_taught(stack: MTPStack, batch: WindowBatch, *, key: RandomKey | None = None) -> Tensor:
    """``[D + 1]`` int64, the number of positions of every depth that count and have a teacher."""
    targets = [taught_targets(stack, k, batch, key) for k in range(batch.depth + 1)]
    return torch.stack([(tokens_BT != IGNORE_INDEX).sum() for tokens_BT in targets])

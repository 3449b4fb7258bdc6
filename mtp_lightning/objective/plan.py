"""The plan of an optimizer step: how much every loss counts, and over how many positions.

``L_k`` is the mean over the valid targets of depth k in the whole step, on all ranks and in all
micro-batches. So a micro-batch divides its sums by the counts of the step, which are known before
the first backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from data_modules.windows import WindowBatch
from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.objective.ranks import sum_over_ranks, world_size
from mtp_lightning.objective.terms.base import Term


@dataclass(frozen=True)
class PositionCounts:
    """Number of positions that count in an optimizer step, over all ranks."""

    valid: Sequence[int]  # [D + 1], positions with a valid target
    taught: Sequence[int] = ()  # [D + 1], those of them that have a teacher
    total: int = 0  # all positions

    def of(self, k: int, term: Term) -> int:
        """Number of positions of depth ``k`` that count for a term."""
        if term.counts_padding:
            return self.total
        return (self.taught if term.needs_teacher else self.valid)[k]


def step_counts(stack: MTPStack, batch: WindowBatch) -> PositionCounts:
    """Count the positions of every depth that count in the whole step, over all ranks, whose
    batches have the same size."""
    # Masks are counted on the host, which avoids waiting for a GPU.
    masked = batch if batch.host is None else replace(batch.host, key=batch.key)
    masks = [stack.valid(k, masked) for k in range(batch.depth + 1)]
    taught = [batch.positions_with_teacher(k) for k in range(batch.depth + 1)]
    windows = len(batch) * world_size()
    positions = windows * batch.seq_len
    if all(mask is None for mask in masks):  # known from the sizes, the same on all ranks
        return PositionCounts([positions] * len(masks), [windows * n for n in taught], positions)
    whole = torch.ones(masked.tokens.shape, dtype=torch.bool, device=masked.device)
    known = [whole if mask is None else mask for mask in masks]
    total = torch.stack(
        [mask[:, : batch.seq_len].sum() for mask in known]
        + [mask[:, :n].sum() for mask, n in zip(known, taught, strict=True)]
    )
    if world_size() > 1:  # ranks communicate through their devices
        total = sum_over_ranks(total.to(batch.device))
    counts = total.tolist()
    return PositionCounts(counts[: len(masks)], counts[len(masks) :], positions)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The plan; the same on every rank, except for the micro-batches."""

    # [D + 1], 1 and the schedule's lambda_k; 0 for a depth without a valid target.
    lambdas: Sequence[float]
    # [D + 1], the factors of the losses. A loss of factor 0 is not computed.
    factors: Sequence[float]
    counts: PositionCounts  # positions that count in the whole step
    windows: int  # number of windows in the whole step
    micro_batches: Sequence[WindowBatch]  # this rank's, each with the key of its random choices

    @property
    def active(self) -> list[int]:
        """The MTP depths that are computed."""
        return depths_of(self.factors)

    @property
    def tasks(self) -> list[int]:
        """The tasks whose losses are computed: the depths, and 0 if the main prediction's is."""
        return tasks_of(self.factors)


def tasks_of(factors: Sequence[float]) -> list[int]:
    """The tasks whose factor is not 0."""
    return [k for k, factor in enumerate(factors) if factor != 0.0]


def depths_of(factors: Sequence[float]) -> list[int]:
    """The MTP depths (1 .. D) whose factor is not 0."""
    return [k for k in tasks_of(factors) if k]

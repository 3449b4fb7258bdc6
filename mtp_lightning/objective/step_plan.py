"""The plan of an optimizer step, and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.inputs import RandomKey
from mtp_lightning.objective.balance.base import depths_of
from mtp_lightning.objective.balance.gradients import TaskGradients, task_gradients
from mtp_lightning.objective.objective import CROSS_ENTROPY, Objective
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.targets import PositionCounts


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The plan of an optimizer step; the same on every rank, except for the micro-batches.

    Attributes:
        progress: progress before the step.
        base: [D + 1], 1 and the schedule's lambda_k; 0 for a depth without a valid target.
        factors: [D + 1], the factors of the losses. A loss of factor 0 is not computed.
        counts: positions that count in the whole step.
        windows: number of windows in the whole step.
        micro_batches: this rank's, each with the key of its random choices.
        objective: the objective of the depths.
    """

    progress: Progress
    base: Sequence[float]
    factors: Sequence[float]
    counts: PositionCounts
    windows: int
    micro_batches: Sequence[tuple[WindowBatch, RandomKey]]
    objective: Objective = CROSS_ENTROPY

    @property
    def active(self) -> list[int]:
        """The MTP depths that are computed."""
        return depths_of(self.factors)

    @property
    def computed(self) -> list[int]:
        """The depths whose losses are computed, 0 included if the main prediction's is."""
        return [k for k in (0, *self.active) if self.factors[k]]

    @property
    def seq_len(self) -> int:
        """T."""
        return self.micro_batches[0][0].seq_len

    def task_gradients(
        self, model: MTPModel, depths: Sequence[int], groups: Mapping[str, list[nn.Parameter]]
    ) -> dict[str, TaskGradients]:
        """The separate gradients of the main prediction and of ``depths``; see
        :func:`~mtp_lightning.objective.balance.gradients.task_gradients`."""
        return task_gradients(
            model, self.micro_batches, depths, self.counts, groups, self.objective
        )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of an optimizer step, over all ranks.

    Attributes:
        plan: the step's plan.
        loss: L.
        losses: [D + 1], L_k, fp64; 0 where not computed.
        flops: FLOPs of the step, positions without a valid target included.
        dtype: dtype in which losses are logged.
        values: by log tag, the values of balancing and clipping.
    """

    plan: StepPlan
    loss: Tensor
    losses: Tensor
    flops: int
    dtype: torch.dtype
    values: dict[str, Tensor | float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Valid targets of the main prediction."""
        return self.plan.counts.valid[0]

    def log_values(self) -> dict[str, Tensor | float]:
        """All values to log, by tag; losses without their factors."""
        plan = self.plan
        values: dict[str, Tensor | float] = {**self.values, "train/loss": self.loss.to(self.dtype)}
        values |= {f"train/loss_depth_{k}": self.losses[k].to(self.dtype) for k in plan.computed}
        lambdas = enumerate(plan.factors[1:], start=1)
        return values | {f"train/lambda_depth_{k}": factor for k, factor in lambdas}

"""The interface of lambda schedules: the lambda of every MTP depth by training progress.

The lambdas are the factors of ``L_k`` in

    L = L_0 + sum_k lambda_k L_k,    k = 1 .. D

A schedule is a pure function of checkpointed progress, not of the clock or of Lightning's epoch
counter, so that a resumed run has the same lambdas at the same step.

The files of this folder need neither torch nor Lightning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from mtp_lightning.errors import UserError


@dataclass(frozen=True)
class Progress:
    """The progress of a run, which checkpoints restore.

    Args:
        step: optimizer steps done before the current one (0 for the first).
        max_steps: optimizer steps of the whole run (`trainer.max_steps`).
        tokens: depth-0 targets seen so far, over all ranks: the sum of ``StepResult.tokens``, which
            schedules in tokens read.

    Raises:
        UserError: the run has no number of steps, which every schedule needs.
    """

    step: int
    max_steps: int
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise UserError(
                f"max_steps={self.max_steps} must be the optimizer steps of the run, by which "
                "schedules move: give Lightning's Trainer max_steps, too."
            )

    @property
    def fraction(self) -> float:
        """step / max_steps, at most 1."""
        return min(self.step / self.max_steps, 1.0)


class LambdaSchedule(ABC):
    """A schedule of the group ``lambda_schedule``, for D = ``depth``; ``name`` is its name in the
    config, empty without one."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.name = ""

    @abstractmethod
    def lambdas(self, progress: Progress) -> list[float]:
        """The factors of L_1 .. L_D in the next step; 0 switches a depth off."""

    @property
    def moves(self) -> bool:
        """Whether the lambdas of two steps of a run can differ; where in doubt, yes."""
        return True

    @property
    def depth_ever_skipped(self) -> bool:
        """Whether a depth's lambda can be exactly 0 in some step, so that its parameters get no
        gradient. Data parallelism needs to know; True if in doubt."""
        return True

"""The interface of the group ``optimizer``: an optimizer of given parameters, and a multiplier of
its learning rates that depends only on the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import nn


class OptimizerConfig(ABC):
    """The config of an optimizer.

    Attributes:
        schedule: (step, steps of the run) -> multiplier of every group's peak learning rate.
    """

    schedule: Callable[[int, int], float]

    @abstractmethod
    def build(self, model: nn.Module, others: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer:
        """The optimizer of the model's parameters that require a gradient, with its groups at their
        peak learning rates. ``others`` are scalars that a balance rule learns: AdamW does not decay
        them, and a group decays them like its other parameters."""


class LearningRates:
    """Moves an optimizer's learning rates along a schedule.

    Args:
        optimizer: a new optimizer, at its peak rates. (Checkpoints restore the rates of their own
            step; the peaks are the config's, also if a run is resumed with other ones.)
        schedule: see :class:`OptimizerConfig`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: Callable[[int, int], float]
    ) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int, max_steps: int) -> dict[str, float]:
        """Sets the rates for ``step``.

        Returns:
            Values to log: ``train/lr``, the rate of the first group, and ``train/lr_NAME`` of the
            groups that have a name.
        """
        scale = self.schedule(step, max_steps)
        values: dict[str, float] = {}
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * scale
            values.setdefault("train/lr", group["lr"])
            if "name" in group:
                values[f"train/lr_{group['name']}"] = group["lr"]
        return values

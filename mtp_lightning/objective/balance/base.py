"""The interface of balance rules, which weigh the prediction tasks by measurements.

The tasks are the main prediction, 0, and the MTP depths whose lambda is not 0. A rule has no loss
term of its own: it changes the factors of the losses, or the gradients that reach the trunk. The
schedule still applies: a rule with weights ``w_k`` gives ``L_k`` the factor ``w_k lambda_k``, with
``lambda_0 = 1``, so that ``w_k = 1`` is training with fixed weights. A depth of lambda 0 is not a
task: it is not computed, and the rule does not change its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mtp_lightning.command_line.check_config import check_settings
from mtp_lightning.errors import UserError
from mtp_lightning.objective.plan import depths_of, tasks_of
from mtp_lightning.objective.schedule.base import Progress

if TYPE_CHECKING:
    from mtp_lightning.model import ModelConfig
    from mtp_lightning.mtp.base import MTPConfig
    from mtp_lightning.objective.balance.gradients import Scope, TaskGradients
    from mtp_lightning.objective.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Observed:
    """The measurements of an optimizer step; the same on every rank.

    Attributes:
        progress: progress before the step.
        lambdas: [D + 1], 1 and the schedule's lambda_k.
        factors: [D + 1], the factors of the losses.
        losses: [D + 1], L_k, fp64 on the CPU; 0 where not computed.
        gradients: the gradients measured in this step; None if none were.
    """

    progress: Progress
    lambdas: Sequence[float]
    factors: Sequence[float]
    losses: Tensor
    gradients: TaskGradients | None = None

    @property
    def computed(self) -> list[int]:
        """The tasks whose loss is known."""
        return tasks_of(self.factors)


@dataclass(eq=False)
class Balance:
    """A balance rule. It gives the factors before a step and observes the step afterwards.

    A rule is a dataclass of its settings, which the comments of its file in conf/balance explain
    and limit.

    Args:
        depth: D.

    Attributes:
        every_n_steps: optimizer steps between two measurements of gradients.
        name: the rule's name on the command line.
        scope: the parameters that the rule measures gradients on; None for no measurement.
        weighs_main: whether the rule changes the main prediction's factor.
        observes: whether :meth:`update` needs the step's losses. Reading them waits for a GPU.
        stored: the private attributes that checkpoints hold, without their underscore.

    Raises:
        UserError: a setting is not allowed.
    """

    name: ClassVar[str]
    scope: ClassVar[Scope | None] = None
    weighs_main: ClassVar[bool] = False
    observes: ClassVar[bool] = True
    stored: ClassVar[Sequence[str]] = ()

    every_n_steps = 1  # not annotated: a setting of the rules that make it one

    depth: int

    def __post_init__(self) -> None:
        if not hasattr(self, "name"):
            raise UserError(
                f"{type(self).__name__} has no name, by which checkpoints know their rule: give "
                'the class an attribute such as name = "mine".'
            )
        check_settings(self, "balance")

    def check(self, config: ModelConfig, objective: Objective) -> None:
        """Refuse a model or an objective whose depths the rule cannot measure or leave out, with a
        :class:`UserError`."""
        if self.scope is not None:
            from mtp_lightning.objective.balance.gradients import require_measurable

            require_measurable(config, objective, setting=f"balance={self.name}")
        for rule in objective.rules:
            if self.skips and not all(measure.of_main for measure in rule.measures):
                raise UserError(
                    f"balance={self.name} leaves depths out of a step, but {rule.setting} needs "
                    "all of them in every step: leave one of the two out."
                )

    def factors(self, lambdas: Sequence[float], progress: Progress) -> list[float]:
        """The factors [D + 1] of the losses in the next step, by default ``lambdas``: 1 and the
        schedule's lambda_k. It does not change the rule's state."""
        return list(lambdas)

    def needs_main(self, mtp: MTPConfig) -> bool:
        """Whether steps compute the main prediction. With a frozen trunk nothing learns from it,
        but the rule may observe it."""
        return mtp.trains_trunk or self.observes

    def rests_at(self, progress: Progress) -> bool:
        """Whether the rule has stopped learning."""
        return False

    def measures_at(self, progress: Progress) -> bool:
        """Whether the next step measures gradients."""
        due = (progress.step + 1) % self.every_n_steps == 0
        return self.scope is not None and due and not self.rests_at(progress)

    def gate(self, lambdas: Sequence[float], gradients: TaskGradients) -> None:
        """Change the accumulated gradients before they are clipped."""

    def update(self, observed: Observed) -> dict[str, float]:
        """Learn from a step, after clipping and before the optimizer's update; returns values to
        log."""
        return {}

    def active_sets(self, lambdas: Sequence[float]) -> list[tuple[float, list[int]]]:
        """The sets of MTP depths that a step may compute, each with its probability."""
        return [(1.0, depths_of(lambdas))]

    @property
    def skips(self) -> bool:
        """Whether a depth can have factor 0 in a step where its lambda is not 0."""
        return False

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that the optimizer learns for the rule; ``optimizer=adamw`` does not decay
        them, groups treat them like their own. The rule sets their gradients itself, the same on
        every rank; they are in no autograd graph."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """The rule's state, in plain containers."""
        return {name: copy(getattr(self, f"_{name}")) for name in self.stored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for name in self.stored:
            setattr(self, f"_{name}", deepcopy(state[name]))


class NoBalance(Balance):
    """Fixed weights: those of the schedule."""

    name = "none"
    observes = False


def multiplied(lambdas: Sequence[float], weights: Tensor) -> list[float]:
    """``w_k lambda_k``, with 0 where lambda_k is 0."""
    return [x * w if x else 0.0 for x, w in zip(lambdas, weights.tolist(), strict=True)]


def softmax_weights(scores: Tensor, tasks: Sequence[int]) -> Tensor:
    """``K softmax`` over the K ``tasks``, fp64, so that their mean is 1; 1 for the others."""
    weights = torch.ones_like(scores)
    weights[list(tasks)] = len(tasks) * torch.softmax(scores[list(tasks)], dim=0)
    return weights

"""The objective of a micro-batch, for tests that choose factors and counts themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from data_modules.windows import RandomKey, WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.auxiliary import AuxiliaryOutputs
from mtp_lightning.objective.balance.base import NoBalance
from mtp_lightning.objective.micro_batch import micro_batch_loss
from mtp_lightning.objective.objective import CROSS_ENTROPY, Objective
from mtp_lightning.objective.plan import PositionCounts, StepPlan, step_counts
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.objective.terms.base import Term


def gradients(model: MTPModel) -> dict[str, Tensor]:
    """The gradients of all parameters, which are then cleared."""
    copies = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return copies


def step_of(
    model: MTPModel, term: Term | Objective = CROSS_ENTROPY, **settings: object
) -> OptimizerStep:
    """A step with all lambdas 1 / D."""
    depth = model.depth
    objective = Objective(term=term) if isinstance(term, Term) else term
    return OptimizerStep(
        model,
        schedule=Piecewise(depth, 1.0),
        balance=NoBalance(depth),
        objective=objective,
        **settings,  # type: ignore[arg-type]
    )


def reported_loss(
    model: MTPModel,
    batch: WindowBatch,
    weights: Sequence[float],
    counts: Sequence[int],
    *,
    main: float = 1.0,
    key: RandomKey | None = None,
    windows: int | None = None,
    term: Term | Objective = CROSS_ENTROPY,
    taught: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, AuxiliaryOutputs]:
    """A micro-batch's part of L, its summed losses [D + 1], or [D + 1, P] of P terms, and what the
    layers reported. Unless ``taught`` says otherwise, the micro-batch is the whole step to terms
    that have a teacher."""
    factors = [main, *weights]
    seen = step_counts(model.mtp, replace(batch, key=key or RandomKey(0, 0))).taught
    plan = StepPlan(
        lambdas=factors,
        factors=factors,
        counts=PositionCounts(list(counts), list(taught or seen)),
        windows=len(batch) if windows is None else windows,
        micro_batches=[batch],
    )
    objective = step_of(model, term).objective
    total, sums_KP, auxiliary = micro_batch_loss(model, objective, plan, replace(batch, key=key))
    return total, sums_KP[:, 0] if sums_KP.shape[1] == 1 else sums_KP, auxiliary


def mtp_loss(*arguments: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """:func:`reported_loss` without the reports."""
    total, sums, _ = reported_loss(*arguments, **settings)
    return total, sums

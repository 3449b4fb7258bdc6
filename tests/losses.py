"""The objective of a micro-batch, for tests that choose factors and counts themselves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import RandomKey
from mtp_lightning.nn.ledger import Ledger
from mtp_lightning.objective.balance.base import NoBalance
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep, StepPlan
from mtp_lightning.objective.terms.base import Term


def step_of(model: MTPModel, term: Term | None = None, **settings: object) -> OptimizerStep:
    """A step with all lambdas 1 / D."""
    depth = model.depth
    return OptimizerStep(
        model,
        schedule=Piecewise(depth, 1.0),
        balance=NoBalance(depth),
        term=term,
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
    term: Term | None = None,
) -> tuple[Tensor, Tensor, Ledger]:
    """A micro-batch's part of L, its summed losses [D + 1], and what the layers reported."""
    factors = [main, *weights]
    plan = StepPlan(
        progress=Progress(step=0, max_steps=1),
        base=factors,
        factors=factors,
        counts=counts,
        windows=len(batch) if windows is None else windows,
        micro_batches=[(batch, key or RandomKey(0, 0))],
    )
    return step_of(model, term).loss(plan, batch, key)


def mtp_loss(
    model: MTPModel,
    batch: WindowBatch,
    weights: Sequence[float],
    counts: Sequence[int],
    *,
    main: float = 1.0,
    key: RandomKey | None = None,
    windows: int | None = None,
    term: Term | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`reported_loss` without the reports."""
    total, sums, _ = reported_loss(
        model, batch, weights, counts, main=main, key=key, windows=windows, term=term
    )
    return total, sums

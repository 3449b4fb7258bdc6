"""Objectives and stacks that make no sense together."""

from __future__ import annotations

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.terms.base import HiddenTerm
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy


def check_together(objective: Objective, mtp: MTPConfig) -> None:
    """Refuse a stack that an objective, or an option of it, has no meaning for.

    Raises:
        UserError: naming both, and the remedy.
    """
    term = f"objective={objective.term.name}"
    plain = isinstance(objective.term, CrossEntropy) and objective == Objective(term=objective.term)
    if mtp.depth and not mtp.predicts_tokens and not plain:
        raise UserError(
            f"{term} and its options say what depths that predict a token are trained on, and "
            f"mtp={mtp.variant} has a loss of its own: leave objective=ce."
        )
    of_drafts = {
        term: objective.couples,
        f"objective.weights={objective.weights}": objective.weights == "acceptance",
        f"objective.mask={objective.mask}": objective.mask != "none",
        "objective.confidence=true": objective.confidence,
    }
    if mtp.stride > 1:
        _refuse(
            of_drafts,
            f"rests on every token up to a depth's, of which mtp.stride={mtp.stride} leaves some "
            "out: leave it out, or set mtp.stride=1",
        )
    if mtp.rank > 1:
        by_state = any(isinstance(part, HiddenTerm) for _, part in objective.parts)
        _refuse(
            of_drafts
            | {
                term: objective.couples or by_state,
                "objective.train_head=false": not objective.train_head,
            },
            f"has no meaning with mtp.rank={mtp.rank}, whose depths and next token are one mixture "
            "and learn together: leave it out, or set mtp.rank=1",
        )
    if mtp.depth == 0:
        _refuse(
            of_drafts | {f"objective.weights={objective.weights}": objective.weights != "none"},
            "has nothing to act on at mtp.depth=0: set mtp.depth to 1 or more, or leave it out",
        )


def _refuse(asked: dict[str, bool], why: str) -> None:
    for what, is_asked in asked.items():
        if is_asked:
            raise UserError(f"{what} {why}.")

"""What a rule of the objective is: it changes what the depths are asked for, position by position.

A rule first says what must be known of all hidden states before any of them learns
(:attr:`Rule.measures`); one pass through the head finds that out for all rules
(``objective/stream.py``). It then changes the targets (:meth:`Rule.apply`), in the order in which
the objective holds the rules.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.objective.targets import DepthTarget
from mtp_lightning.objective.terms.base import Term

Seen = Mapping[str, Mapping[int, Tensor]]
"""A measure's name -> depth -> its values [B, T], fp32 (in a double precision model fp64). Where a
position has no target, or no teacher that the measure compares with, a number without meaning."""


class Measure(Term):
    """A number for every position, to be known before any depth learns.

    Attributes:
        of_main: whether it is of the main prediction; else it is of every depth.
    """

    of_main: ClassVar[bool] = False
    is_word = False


class Rule(ABC):
    """A rule.

    Attributes:
        asked: the setting that asks for it, for messages: ``objective.mask=entropy``.
        of_drafts: whether it rests on every token up to a depth's, as drafts do.
        measures: what must be known beforehand.
    """

    asked: str
    of_drafts: ClassVar[bool] = True
    measures: tuple[Measure, ...] = ()

    def parts(self, stack: MTPStack) -> Sequence[tuple[float, Term]]:
        """Terms that every depth is trained on beside the objective's, each with its weight."""
        return ()

    def apply(self, targets: Sequence[DepthTarget], seen: Seen) -> list[DepthTarget]:
        """The targets as the rule leaves them, in their order.

        Args:
            targets: of the main prediction, then of the depths.
            seen: what the measures found.
        """
        return list(targets)

    def learn(self) -> dict[str, float]:
        """Take note of the optimizer step that is over. Returns what to log of it."""
        return {}

    def flops(self, d_model: int) -> int:
        """FLOPs of training a position of one depth that the rule's terms add."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """What it has learned, in plain containers. No two rules use the same key."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """The inverse of :meth:`state_dict`; ``state`` is that of all rules."""


def require_reader(key: str, value: object, reader: str, *, chosen: bool) -> None:
    """Refuse a setting that nothing reads.

    Args:
        key: below ``objective``.
        value: its value; None is no setting.
        reader: what would read it: ``objective.mask=entropy``.
        chosen: whether that is chosen.

    Raises:
        UserError: naming both.
    """
    if value is not None and not chosen:
        raise UserError(
            f"objective.{key}={value} is read by {reader} alone: set that, or leave it null."
        )

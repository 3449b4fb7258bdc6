"""The interface of the objective's rules, which change the targets position by position.

A rule names the measures that it needs of all hidden states before any of them learns
(:attr:`Rule.measures`); one prepass through the head computes them for all rules
(``objective/micro_batch.py``). The rules then change the targets (:meth:`Rule.apply`), one after
the other.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.objective.targets import DepthTarget
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.registry import imported
from mtp_lightning.settings import require_choice

ByDepth = Mapping[int, Tensor]
"""Depth -> a tensor [B, T]."""

Measures = Mapping[str, ByDepth]
"""A measure's name -> its values, at least fp32; arbitrary at positions without a target, or
without a teacher that the measure needs."""


class PositionMeasure(Term):
    """A number per position that a prepass computes before any depth learns.

    Attributes:
        of_main: whether it is computed for the main prediction; else for every depth.
    """

    of_main: ClassVar[bool] = False
    selectable = False


class Rule(ABC):
    """A rule.

    Attributes:
        setting: the setting that selects it, for messages: ``objective.mask=entropy``.
        of_drafts: whether it needs a prediction of every token up to depth k; stacks that skip
            tokens refuse it.
        measures: the measures that it needs.
    """

    setting: str
    of_drafts: ClassVar[bool] = True
    measures: tuple[PositionMeasure, ...] = ()

    def apply(self, targets: Sequence[DepthTarget], values: Measures) -> list[DepthTarget]:
        """The targets, the main prediction's first, after the rule has changed them by the values
        of its measures; in the same order."""
        return list(targets)

    def after_backward(self) -> dict[str, float]:
        """Learn from an optimizer step, after its backward passes; returns values to log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The rule's state, in plain containers. Keys must be unique among all rules."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """The inverse of :meth:`state_dict`; ``state`` holds the keys of all rules."""


def select_rules(
    setting: str, word: str, classes: Mapping[str, tuple[str, Sequence[str]]], **settings: Any
) -> list[Rule]:
    """The rule that the word of a setting of the objective selects, imported on demand; empty for
    ``none``.

    Args:
        classes: each word's class, ``MODULE.CLASS`` of this package, and the settings that it
            reads.
        settings: the values of these settings; None if not set.

    Raises:
        UserError: the word is unknown, or a setting is out of range or not read by the rule.
    """
    require_choice(f"objective.{setting}", word, ("none", *classes))
    for reader, (_, keys) in classes.items():
        for key in keys:
            if settings[key] is not None and reader != word:
                raise UserError(
                    f"objective.{key}={settings[key]} is read by objective.{setting}={reader} "
                    "alone: set that, or leave it null."
                )
    if word == "none":
        return []
    name, keys = classes[word]
    kind = imported(f"{__package__}.{name}")
    return [kind(**{key: settings[key] for key in keys if settings[key] is not None})]

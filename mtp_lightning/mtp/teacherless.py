"""Teacherless training (Bachmann & Nagarajan 2024, arXiv 2403.06963, section 5): no further head.

In training the model does not read the answer's tokens: a dummy token replaces each of them, so
that the model predicts the whole answer in one pass from the question alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.kinds import NoModules
from mtp_lightning.nn.config import TrunkConfig

DUMMY = 0
"""Id of the dummy token: the one that pads a task's windows, and that no question contains."""


@dataclass(frozen=True, kw_only=True)
class TeacherlessConfig(MTPConfig, variant="teacherless"):
    """``mtp=teacherless``: no parameters, no cost; for tasks only."""

    fixed_depth: ClassVar[int] = 0
    answers_at_once: ClassVar[bool] = True

    depth: int = 0

    def export_obstacle(self) -> str:
        return "gives its answers at once, and other programs read a text token by token"

    def build(self, trunk: TrunkConfig) -> Teacherless:
        return Teacherless(self)


class Teacherless(NoModules):
    """The empty stack of a model that is not shown answers."""

    def tokens_read(self, tokens_BW: Tensor, scored_BW: Tensor | None) -> Tensor:
        if scored_BW is None:
            raise UserError("mtp=teacherless needs a task, whose windows mark the answers.")
        return tokens_BW.masked_fill(scored_BW, DUMMY)

"""Stacks whose single depth shapes the trunk in training and is not used afterwards.

They do not predict one token per depth, so they have no agreement and no drafts, and ``mtp.depth``
is always 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPConfig, MTPStack
from mtp_lightning.mtp.inputs import BranchPoint
from mtp_lightning.settings import require_whole


@dataclass(frozen=True, kw_only=True)
class TrainingOnlyConfig(MTPConfig):
    """The config of such a stack.

    Attributes:
        lookahead: how many tokens ahead of a position the stack looks, at most.
    """

    fixed_depth: ClassVar[int] = 1
    predicts_tokens: ClassVar[bool] = False
    # How far ahead the nearest token is that the stack looks at: 1 is the next one.
    first_ahead: ClassVar[int] = 1

    depth: int = 1
    lookahead: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("mtp.lookahead", self.lookahead, least=self.first_ahead)

    @property
    def places_ahead(self) -> int:
        return self.lookahead


class TrainingOnly(MTPStack):
    """A stack that has nothing to draft with."""

    config: TrainingOnlyConfig

    def depth_state(self, k: int, at: BranchPoint, previous_BTC: Tensor) -> Tensor:
        return at.hidden

    @property
    def max_draft_depth(self) -> int | None:
        return 0

    def require_drafts(self) -> None:
        raise UserError(
            f"mtp={self.config.variant} shapes the trunk in training and has nothing to draft "
            "with: decode it without drafts, or train another mtp variant."
        )

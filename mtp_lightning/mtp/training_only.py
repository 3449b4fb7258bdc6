"""Stacks whose single depth shapes the trunk in training and is not used afterwards.

They do not predict one token per depth, so they have no agreement and no drafts, and ``mtp.depth``
is always 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPConfig, MTPStack
from mtp_lightning.mtp.inputs import BranchPoint, RandomKey
from mtp_lightning.settings import require_whole


@dataclass(frozen=True, kw_only=True)
class TrainingOnlyConfig(MTPConfig):
    """The config of such a stack.

    Attributes:
        lookahead: how many tokens ahead of a position the stack looks, at most.
    """

    fixed_depth: ClassVar[int] = 1
    predicts_tokens: ClassVar[bool] = False
    least_lookahead: ClassVar[int] = 1

    depth: int = 1
    lookahead: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("mtp.lookahead", self.lookahead, least=self.least_lookahead)

    @property
    def places_ahead(self) -> int:
        return self.lookahead


class TrainingOnly(MTPStack):
    """A stack that has nothing to draft with."""

    config: TrainingOnlyConfig

    def states(
        self, at: BranchPoint, active: Sequence[int], key: RandomKey | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        for k in active:
            yield k, at.hidden

    def depth_state(self, *read: Any) -> Tensor:
        self.require_drafts()
        raise AssertionError

    @property
    def max_draft_depth(self) -> int | None:
        return 0

    def require_drafts(self) -> None:
        raise UserError(
            f"mtp={self.config.variant} shapes the trunk in training and has nothing to draft "
            "with: decode it without drafts, or train another mtp variant."
        )

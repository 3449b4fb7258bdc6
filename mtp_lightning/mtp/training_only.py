"""Stacks whose one depth shapes the trunk in training, and is of no use afterwards.

They look at the tokens ahead in another way than one depth a token, so their depth has no token to
agree with, nothing to draft, and no further depth beside it: ``mtp.depth`` is 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import BranchPoint, MTPConfig, MTPStack, RandomKey
from mtp_lightning.settings import require_whole


@dataclass(frozen=True, kw_only=True)
class TrainingOnlyConfig(MTPConfig):
    """What such a stack's config has.

    Attributes:
        depth: always 1.
        lookahead: places ahead of a position that the stack looks at, at most.

    Raises:
        UserError: another depth, or a reach that is no whole number within bounds.
    """

    predicts_tokens: ClassVar[bool] = False
    least_lookahead: ClassVar[int] = 1

    depth: int = 1
    lookahead: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth != 1:
            raise UserError(
                f"mtp={self.variant} has one loss beside the main prediction's, but mtp.depth="
                f"{self.depth}: set it 1 (mtp=none is plain training)."
            )
        require_whole("mtp.lookahead", self.lookahead, least=self.least_lookahead)

    @property
    def places_ahead(self) -> int:
        return self.lookahead


class TrainingOnly(MTPStack):
    """A stack that gives nothing to draft with."""

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

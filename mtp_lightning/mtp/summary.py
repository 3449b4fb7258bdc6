"""Heads that predict a summary of all tokens ahead, with their own output matrix.

Such a head is one matrix on the trunk's final state, trained on its own loss over the tokens ahead
of every position.

Shapes: B windows, T positions, W tokens of a window, R positions of one chunk, S tokens ahead.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.config import Detach
from mtp_lightning.mtp.feed import OwnLoss
from mtp_lightning.mtp.kinds import TrainingOnly, TrainingOnlyConfig
from mtp_lightning.mtp.look_ahead import LookAhead
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.linear import Linear


@dataclass(frozen=True, kw_only=True)
class SummaryConfig(TrainingOnlyConfig):
    """Switches of a head with its own unembedding.

    With a frozen or detached trunk the head is a probe: its loss measures what the trunk knows of
    the tokens ahead, and nothing else learns from it.

    Attributes:
        detach: ``trunk`` stops the head's gradient at the trunk's state. There is no ``all``, since
            the head does not use the shared head.
        freeze_trunk: embedding, trunk and head keep their weights; only this head is trained.
    """

    brings_loss: ClassVar[bool] = True

    detach: Detach = "none"
    freeze_trunk: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detach == "all":
            raise UserError(
                f"mtp.detach=all has no meaning for mtp={self.variant}, which does not use the "
                "shared head: set mtp.detach=trunk."
            )

    def outputs(self, trunk: TrunkConfig) -> int:
        """Rows of the matrix: outputs of the head per position."""
        return trunk.vocab_size


class Summary(TrainingOnly):
    """One matrix on the trunk's final state, [V, C] unless ``config.outputs`` says otherwise."""

    config: SummaryConfig

    def __init__(self, config: SummaryConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        self.head = Linear(trunk.d_model, config.outputs(trunk))

    @abstractmethod
    def own_loss(self, k: int, batch: WindowBatch) -> OwnLoss: ...

    def ahead_of(self, batch: WindowBatch) -> LookAhead:
        """The tokens ahead that the head predicts."""
        return LookAhead(batch, first=self.config.first_ahead, last=self.config.lookahead)


class SummaryLoss(OwnLoss):
    """A loss over the tokens ahead, in closed form, which trains the matrix of ``head``."""

    def __init__(self, head: Summary, batch: WindowBatch) -> None:
        self.head, self.ahead = head, head.ahead_of(batch)
        super().__init__(head.head.weight, self.ahead.valid())
        # The tokens ahead of a chunk take as much memory as its logits, or less.
        self.width = self.ahead.last

    def value(self, rows: slice, logits_RV: Tensor) -> Tensor:
        return self.gradient(rows, logits_RV)[0]

    def gradient(self, rows: slice, logits_RV: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_ahead(logits_RV, *self.ahead.rows(rows))

    @abstractmethod
    def of_ahead(
        self, logits_RV: Tensor, tokens_RS: Tensor, counts_RS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of every position [R], and its gradient with respect to the logits [R, V].

        Args:
            logits_RV: the head's logits, at least fp32; may be overwritten.
            tokens_RS: ids of the tokens ahead, the nearest first.
            counts_RS: which of them count and are the nearest of their id. If none does, the
                results must be finite; they are multiplied by 0.
        """

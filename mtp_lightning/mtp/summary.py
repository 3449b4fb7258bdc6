"""Heads that say something of all tokens ahead together, through an unembedding of their own.

Such a head is one matrix on the trunk's final state. What it is trained on is a term of the room
``objective/summaries``; here is what it looks at, and what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.switches import Detach
from mtp_lightning.mtp.training_only import TrainingOnly, TrainingOnlyConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.linear import Linear


@dataclass(frozen=True, kw_only=True)
class SummaryConfig(TrainingOnlyConfig):
    """Switches of a head with an unembedding of its own.

    With a frozen or cut-off trunk the head is a probe: its loss says what the trunk knows of the
    tokens ahead, and nothing else learns from it.

    Attributes:
        detach: ``trunk`` stops the head's gradient at the trunk's state. It has no part in the
            shared head, so that there is no ``all``.
        freeze_trunk: embedding, trunk and head keep their weights; only this head is trained.

    Raises:
        UserError: a switch has a value that it does not know.
    """

    # Places ahead of the nearest token that is looked at.
    first_ahead: ClassVar[int]

    detach: Detach = "none"
    freeze_trunk: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detach == "all":
            raise UserError(
                f"mtp.detach=all would cut mtp={self.variant} off from a shared head that it does "
                "not use: set mtp.detach=trunk."
            )

    def num_params(self, trunk: TrunkConfig) -> int:
        return trunk.embedding_params()

    def module_flops(self, trunk: TrunkConfig, seq_len: int, active: Sequence[int]) -> int:
        return len(active) * trunk.head_flops()

    def module_backward_flops(self, trunk: TrunkConfig, seq_len: int, active: Sequence[int]) -> int:
        reaches_trunk = self.trains_trunk and self.detach == "none"
        return (1 + reaches_trunk) * self.module_flops(trunk, seq_len, active)

    def projections(self, active: Sequence[int]) -> int:
        return 0


class Summary(TrainingOnly):
    """One matrix [V, C] on the trunk's final state."""

    config: SummaryConfig

    def __init__(self, config: SummaryConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        self.head = Linear(trunk.d_model, trunk.vocab_size)

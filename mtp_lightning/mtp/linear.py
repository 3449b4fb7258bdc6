"""Medusa's heads (Cai et al. 2024, arXiv 2401.10774, section 2.1.1) on the shared output head.

    h^k = z + SiLU(W_k z),    k = 1 .. D

where ``z`` is the trunk's state at the branch point. ``W_k`` starts at zero, so that every head
starts as a copy of the main prediction. Medusa has one output matrix per head; here all heads use
the trunk's own. ``correction`` lets the heads see the tokens between
(``correction.py``); ``rank`` predicts all depths jointly (``rank.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.mtp.correction import SideBySideConfig
from mtp_lightning.mtp.kinds import SideBySide
from mtp_lightning.mtp.rank import MixtureLinearMTP, check_rank
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.linear import ZeroLinear


@dataclass(frozen=True, kw_only=True)
class LinearConfig(SideBySideConfig, variant="linear"):
    """Switches of Medusa's heads; the defaults are the paper's.

    Attributes:
        rank: r, components of one joint prediction of all tokens (arXiv 2410.17765). Above 1 the
            next token's prediction is a mixture too.
    """

    meaning: ClassVar[tuple[str, ...]] = ("branch", "stride", "rank")

    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)

    def check_objective(self, draft_rules: Sequence[str], separate_training: Sequence[str]) -> None:
        super().check_objective(draft_rules, separate_training)
        if self.rank > 1 and (settings := [*draft_rules, *separate_training]):
            raise UserError(
                f"{settings[0]} has no meaning with mtp.rank={self.rank}, whose depths and next "
                "token are one mixture and learn together: leave it out, or set mtp.rank=1."
            )

    def export_obstacle(self) -> str:
        mixed = "predicts the next token by a mixture, which no other program computes"
        return f"with mtp.rank={self.rank} {mixed}" if self.rank > 1 else ""

    def build(self, trunk: TrunkConfig) -> MTPStack:
        return LinearMTP(self, trunk) if self.rank == 1 else MixtureLinearMTP(self, trunk)


class LinearMTP(SideBySide):
    """D matrices side by side."""

    cached_blocks = 0

    def __init__(self, config: LinearConfig, trunk: TrunkConfig) -> None:
        heads = [ZeroLinear(trunk.d_model, trunk.d_model) for _ in range(config.depth)]
        super().__init__(config, heads, *config.build_correction(trunk, config.depth))

    def step(self, k: int, branch_BTC: Tensor, ctx: ForwardContext) -> Tensor:
        return branch_BTC + F.silu(self.depths[k - 1](branch_BTC))

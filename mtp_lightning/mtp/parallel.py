"""Gloeckle's parallel heads (Gloeckle et al. 2024, arXiv 2404.19737, section 2).

    h^k = norm_k(Block_k(z)),    k = 1 .. D

where ``z`` is the trunk's state at the branch point; no head reads a token or another head.
Embedding and output head are the trunk's. ``correction`` lets the heads see the tokens between
(``correction.py``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.config import Branch, Init, InputNorm
from mtp_lightning.mtp.correction import SideBySideConfig
from mtp_lightning.mtp.inputs import TrunkText
from mtp_lightning.mtp.kinds import SideBySide
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.trunk import Trunk


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(SideBySideConfig, variant="parallel"):
    """Switches of the parallel heads; the defaults are the paper's.

    Attributes:
        branch: ``before_last`` gives every prediction, the main one included, one block of its own
            on a trunk of L - 1 blocks; ``final`` puts the heads on the whole trunk.
        input_norm: ``pre`` gives the heads the residual stream itself, as if they were the trunk's
            next block; ``post`` the state after the trunk's final norm.
        init: initialization of heads that ``init_from`` does not provide. ``random`` draws the
            block at random and copies the trunk's final norm; ``last_block`` also copies the
            trunk's last block, so that with ``branch=before_last`` a head starts as the main
            prediction.
    """

    meaning: ClassVar[tuple[str, ...]] = ("branch", "input_norm", "stride")

    branch: Branch = "before_last"
    input_norm: InputNorm = "pre"
    init: Init = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "last_block" and self.input_norm == "post":
            raise UserError(
                f"mtp.init={self.init} has no meaning for parallel heads with mtp.input_norm=post: "
                "the trunk's last block reads the state before the final norm; set mtp.input_norm="
                "pre, or mtp.init=random."
            )

    def build(self, trunk: TrunkConfig) -> ParallelMTP:
        return ParallelMTP(self, trunk)


class ParallelHead(nn.Module):
    """One depth: a block and an output norm."""

    def __init__(self, trunk: TrunkConfig) -> None:
        super().__init__()
        self.block = Block(trunk)
        self.norm = RMSNorm(trunk.d_model, trunk.norm_eps)

    def forward(self, branch_BTC: Tensor, ctx: ForwardContext) -> Tensor:
        return self.norm(self.block(branch_BTC, ctx))


class ParallelMTP(SideBySide):
    """D heads side by side."""

    def __init__(self, config: ParallelConfig, trunk: TrunkConfig) -> None:
        heads = [ParallelHead(trunk) for _ in range(config.depth)]
        super().__init__(config, heads, *config.build_correction(trunk, config.depth))

    def step(self, k: int, branch_BTC: Tensor, ctx: ForwardContext) -> Tensor:
        return self.depths[k - 1](branch_BTC, ctx)

    @torch.no_grad()
    def init_from_trunk(
        self, fresh: Collection[int], trunk: Trunk, head: Head, text: TrunkText | None
    ) -> None:
        from mtp_lightning.mtp.last_block import copy_last_blocks

        for i in fresh:
            module = cast(ParallelHead, self.depths[i])
            module.norm.load_state_dict(trunk.norm.state_dict())
            if self.config.init == "last_block":
                copy_last_blocks([module.block], trunk)

"""Multi-token prediction without parameters (modded-nanogpt, record of 2025-12-22).

The next token's logits are trained on several targets at once:

    L = -sum_k lambda_k log p(t_{i+1+k} | t_{<=i}),    k = 0 .. D,  lambda_0 = 1

with one distribution ``p``, the main prediction's. So depth k's loss is the same logits' loss at
the target k places on. It shapes training, usually with weights that fall to 0 on the way
(``lambda_schedule=modded_nanogpt``); there is nothing to draft with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mtp_lightning.mtp.base import MTPConfig, MTPStack
from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.trunk import Trunk, TrunkOutput


@dataclass(frozen=True, kw_only=True)
class ParameterFreeConfig(MTPConfig):
    """``mtp=parameter_free``: no weights, and no matrix product beyond the trunk's own."""

    def build(self, trunk: TrunkConfig) -> ParameterFreeMTP:
        return ParameterFreeMTP(self.depth)

    def num_params(self, trunk: TrunkConfig) -> int:
        return 0

    def module_flops(self, trunk: TrunkConfig, seq_len: int, active: Sequence[int]) -> int:
        return 0

    def projections(self, active: Sequence[int]) -> int:
        return 0


class ParameterFreeMTP(MTPStack):
    """Every depth is the main prediction's hidden state."""

    def branch(self, trunk: Trunk, output: TrunkOutput) -> Tensor:
        return output.final

    @property
    def max_draft_depth(self) -> int | None:
        return 0

    @property
    def reads_tokens(self) -> bool:
        return False

    @property
    def shares_hidden(self) -> bool:
        return True

    def require_drafts(self) -> None:
        raise ValueError(
            "mtp=parameter_free trains the next token's own logits on further targets and has no "
            "module to draft with: decode it without drafts, or train another mtp variant."
        )

    def steps(self, active: Sequence[int]) -> list[int]:
        return sorted(active)

    def step(
        self,
        k: int,
        *,
        branch_BTC: Tensor,
        previous_BTC: Tensor,
        embedded_BTC: Tensor,
        positions: Positions,
    ) -> Tensor:
        return branch_BTC

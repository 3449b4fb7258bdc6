"""Joint multi-token prediction (JTP; Ahn, Lamb & Langford 2025, arXiv 2503.21801).

    c_j = gamma h_t + Emb(x_{t+j}),    j = 0 .. D
    h^k = h_t + Attention(norm(c_0), .., norm(c_k)),    k = 1 .. D

where ``h_t`` is the trunk's state at the branch point. One causal attention layer runs over j,
separately for every t, and the shared head predicts ``x_{t+1+k}`` from ``h^k``. All that a depth
knows of the text before t comes from ``h_t``: the representation bottleneck. The prediction of
``x_{t+1}`` is the trunk's own, so that the depths do not change it.

The paper leaves the form of the layer open. Here it is the trunk's kind of attention after an
RMSNorm, with j as the rotary position; ``gamma`` is learned and starts at 1.

Shapes: B batch, T positions, J entries c_j of one position, C d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.mtp.config import BranchConfig
from mtp_lightning.mtp.inputs import StackInputs
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class JointConfig(BranchConfig, variant="joint"):
    """Switches of the joint head; the defaults are the paper's."""

    def build(self, trunk: TrunkConfig) -> JointMTP:
        return JointMTP(self, trunk)


class JointMTP(MTPStack):
    """One attention layer for all depths, which are computed in one pass."""

    cached_blocks = 0  # it attends only over the entries of one position

    def __init__(self, config: JointConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        self.trunk_config = trunk
        if config.depth:
            self.gamma = nn.Parameter(torch.ones(1))
            self.norm = RMSNorm(trunk.d_model, trunk.norm_eps)
            self.attention = trunk.attention.build(trunk, None)

    def reads(self, k: int) -> range:
        return range(k + 1)

    def states(self, inputs: StackInputs, active: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        if active:
            hidden_BTJC = self._hidden_states(inputs, max(active) + 1)
            for k in self.with_prerequisites(active):
                yield k, hidden_BTJC[:, :, k]

    def depth_state(self, k: int, inputs: StackInputs, previous_BTC: Tensor) -> Tensor:
        return self._hidden_states(inputs, k + 1)[:, :, k]

    def _hidden_states(self, inputs: StackInputs, places: int) -> Tensor:
        """The hidden states ``h^0 .. h^(places - 1)``, [B, T, J, C]."""
        tokens_BTJC = torch.stack([inputs.embedded_at(j) for j in range(places)], dim=2)
        if self.config.detach == "all":
            tokens_BTJC = tokens_BTJC.detach()
        branch_BT1C = inputs.branch.unsqueeze(2)
        window = self.norm((self.gamma * branch_BT1C + tokens_BTJC).flatten(0, 1))
        ctx = ForwardContext.of_window(
            self.trunk_config,
            places,
            device=window.device,
            dtype=self.gamma.dtype,
            auxiliary=inputs.ctx.auxiliary,
        )
        return branch_BT1C + self.attention(window, ctx).view_as(tokens_BTJC)

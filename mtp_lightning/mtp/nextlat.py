"""NextLat's model of the next hidden state (arXiv 2511.05963), applied recursively.

    g_{t+1} = h_t + MLP(LN[h_t ; Emb(x_{t+1})]),    g_{t+i+1} = g_{t+i} + MLP(LN[g_{t+i} ; ..])

where ``h_t`` is the trunk's state after its final norm. ``g_{t+k}`` predicts ``h_{t+k}`` and is the
state of depth k, which the shared head projects. The MLP has three layers of the trunk's width with
GELU between them, without biases, and its last layer starts at zero: every depth starts as the main
prediction. One module serves all depths, so it can draft any number of tokens.

The loss is set by ``objective=``, not here; the paper's is the distance to ``sg h_{t+k}`` plus the
divergence between the head's two predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.mtp.config import BranchConfig
from mtp_lightning.mtp.kinds import Chain
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.linear import Linear, ZeroLinear


@dataclass(frozen=True, kw_only=True)
class NextLatConfig(BranchConfig, variant="nextlat"):
    """Switches of the state model; the defaults are the paper's."""

    def build(self, trunk: TrunkConfig) -> NextLatMTP:
        return NextLatMTP(self, trunk)


class StateModel(nn.Module):
    """The next hidden state from this one and the token between them."""

    def __init__(self, trunk: TrunkConfig) -> None:
        super().__init__()
        c = trunk.d_model
        self.norm = nn.LayerNorm(2 * c, trunk.norm_eps)
        self.first = Linear(2 * c, c)
        self.second = Linear(c, c)
        self.last = ZeroLinear(c, c)

    def forward(self, hidden_BTC: Tensor, embedded_BTC: Tensor) -> Tensor:
        x = self.norm(torch.cat((hidden_BTC, embedded_BTC), dim=-1))
        return hidden_BTC + self.last(F.gelu(self.second(F.gelu(self.first(x)))))


class NextLatMTP(Chain):
    """One module, applied D times."""

    cached_blocks = 0
    repeats = True

    def __init__(self, config: NextLatConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        self.depths = nn.ModuleList(StateModel(trunk) for _ in range(min(config.depth, 1)))

    def step(
        self, k: int, previous_BTC: Tensor, embedded_BTC: Tensor, ctx: ForwardContext
    ) -> Tensor:
        return self.depths[0](previous_BTC, embedded_BTC)

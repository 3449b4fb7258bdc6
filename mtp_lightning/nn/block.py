"""One pre-norm decoder block."""

from __future__ import annotations

from torch import Tensor, nn

from mtp_lightning.nn.attention import Attention, Positions
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.feed_forward import FeedForward
from mtp_lightning.nn.norm import RMSNorm


class Block(nn.Module):
    """``h = x + attention(norm(x))``, then ``h + feed_forward(norm(h))``."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTC: Tensor, positions: Positions, layer: int = 0) -> Tensor:
        """[B, T, C] -> [B, T, C]; ``layer`` is this block's place in the cache, if there is one."""
        h_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), positions, layer)
        return h_BTC + self.feed_forward(self.feed_forward_norm(h_BTC))

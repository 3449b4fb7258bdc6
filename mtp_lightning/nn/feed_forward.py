"""The SwiGLU feed-forward layer (Shazeer 2020, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mtp_lightning.nn.components import FeedForwardConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.ops import gated, swiglu


@dataclass(frozen=True, kw_only=True)
class DenseConfig(FeedForwardConfig, variant="dense"):
    """One SwiGLU layer for all tokens, of inner width ``model.d_ff``."""

    same_bits_in_wide_passes: ClassVar[bool] = True

    def build(self, trunk: TrunkConfig, layer: int | None) -> nn.Module:
        return FeedForward(trunk.d_model, trunk.d_ff)


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up are one matrix, gate first."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = Linear(d_model, 2 * d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x_BTC: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]; ``ctx`` is read for the layers' updates alone."""
        if ctx is not None and ctx.updates is not None:
            return ctx.linear(self.down, gated(ctx.linear(self.gate_up, x_BTC)))
        return swiglu(x_BTC, self.gate_up.weight, self.down.weight)

"""One pre-norm decoder block, with the attention and feed-forward layers of the config."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.norm import RMSNorm


class Block(nn.Module):
    """``h = x + attention(norm(x))``, then ``h + feed_forward(norm(h))``. ``layer`` is its index in
    the trunk, None for the block of a prediction module."""

    def __init__(self, config: TrunkConfig, layer: int | None = None) -> None:
        super().__init__()
        self.recompute = config.recompute
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = config.attention.build(config, layer)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = config.feed_forward.build(config, layer)

    def forward(self, x_BTC: Tensor, ctx: ForwardContext, layer: int = 0) -> Tensor:
        """[B, T, C] -> [B, T, C]; ``layer`` is this block's index in the cache, if there is one."""
        if self.recompute and self.training and torch.is_grad_enabled():
            # The first pass reports to the context's collectors, its repetition does not.
            contexts = itertools.chain([ctx], itertools.repeat(ctx.repeated()))
            return checkpoint(
                lambda x: self._compute(x, next(contexts), layer), x_BTC, use_reentrant=False
            )
        return self._compute(x_BTC, ctx, layer)

    def _compute(self, x_BTC: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        h_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), ctx, layer)
        return h_BTC + self.feed_forward(self.feed_forward_norm(h_BTC), ctx)


def is_compiled(model: nn.Module) -> bool:
    """Whether a model's blocks are compiled."""
    blocks = (layer for layer in model.modules() if isinstance(layer, Block))
    return any(block._compiled_call_impl is not None for block in blocks)


def eager_blocks(model: nn.Module) -> AbstractContextManager[None]:
    """Runs a model's blocks eagerly, compiled ones as well: passes of many sizes would compile them
    again and again."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()

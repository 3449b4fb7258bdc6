"""Causal grouped-query attention (Ainslie et al. 2023) with rotary positions.

Shapes: B batch, T positions, C d_model, N heads, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtp_lightning.errors import UserError
from mtp_lightning.nn.components import AttentionConfig, check_whole
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.document_attention import MIN_WIDTH
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.ops import rotary, rotary_attention
from mtp_lightning.nn.rope import rotate_in_place
from mtp_lightning.settings import require_bool


@dataclass(frozen=True, kw_only=True)
class GroupedQueryConfig(AttentionConfig, variant="grouped_query"):
    """Grouped-query attention: ``n_heads / n_kv_heads`` query heads share a key-value head.

    Attributes:
        qk_norm: RMSNorm on every query and key head before RoPE (Qwen3).
        qkv_bias: a bias on queries, keys and values, which starts at 0 (Qwen2).
        d_rope: dimensions of a query or key head that are rotated, even (half of them in GLM-4.5);
            None rotates all. The first ``d_rope / 2`` of the pairs (j, j + H/2) are rotated.

    Raises:
        UserError: ``d_rope`` is not an even number of at least 2.
    """

    same_bits_in_wide_passes: ClassVar[bool] = True

    qk_norm: bool = False
    qkv_bias: bool = False
    d_rope: int | None = None

    def __post_init__(self) -> None:
        for name in ("qk_norm", "qkv_bias"):
            require_bool(f"model.attention.{name}", getattr(self, name))
        if self.d_rope is None:
            return
        check_whole("model.attention", self, ("d_rope",), least=2)
        if self.d_rope % 2:
            raise UserError(
                f"model.attention.d_rope={self.d_rope} must be even: RoPE rotates pairs of it."
            )

    def check(self, trunk: TrunkConfig) -> None:
        if self.rotary_dim(trunk) > trunk.d_head:
            raise UserError(
                f"model.attention.d_rope={self.d_rope} is more than a head has, model.d_head="
                f"{trunk.d_head}: lower it, or leave it out to rotate all."
            )

    def rotary_dim(self, trunk: TrunkConfig) -> int:
        return trunk.d_head if self.d_rope is None else self.d_rope

    def reads_blocks(self, trunk: TrunkConfig) -> bool:
        return type(self) is GroupedQueryConfig and trunk.d_head >= MIN_WIDTH

    def build(self, trunk: TrunkConfig, layer: int | None) -> nn.Module:
        return Attention(trunk, self)


def qkv_width(trunk: TrunkConfig) -> int:
    """Output width of the fused query, key and value projection."""
    return (trunk.n_heads + 2 * trunk.n_kv_heads) * trunk.d_head


class Attention(nn.Module):
    """The attention layer. Queries, keys and values are one matrix, in this order, each with its
    heads side by side."""

    qkv_bias: nn.Parameter | None

    def __init__(self, trunk: TrunkConfig, config: GroupedQueryConfig) -> None:
        super().__init__()
        self.n_heads = trunk.n_heads
        self.n_kv_heads = trunk.n_kv_heads
        self.d_head = trunk.d_head
        width = qkv_width(trunk)
        self.qkv = Linear(trunk.d_model, width)
        self.out = Linear(trunk.n_heads * trunk.d_head, trunk.d_model)
        bias = nn.Parameter(torch.zeros(width)) if config.qkv_bias else None
        self.register_parameter("qkv_bias", bias)
        # One gain for all heads.
        self.query_norm = RMSNorm(trunk.d_head, trunk.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(trunk.d_head, trunk.norm_eps) if config.qk_norm else None

    def forward(self, x_BTC: Tensor, ctx: ForwardContext, layer: int = 0) -> Tensor:
        """[B, T, C] -> [B, T, C]; ``layer`` is this layer's index in ``ctx.cache``."""
        batch, seq_len, _ = x_BTC.shape
        qkv = self.heads(x_BTC, ctx)
        if ctx.cache is None:
            if ctx.kv_sink is not None:
                key, value = qkv[:, :, self.n_heads :].split(self.n_kv_heads, dim=2)
                key = rotary(key, ctx.cos, ctx.sin)
                ctx.kv_sink(layer, torch.cat((key, value), dim=2))
            mixed = rotary_attention(qkv, ctx.cos, ctx.sin, ctx.mask, self.n_heads, self.n_kv_heads)
        else:
            n_rotary_heads = self.n_heads + self.n_kv_heads
            rotate_in_place(qkv.narrow(2, 0, n_rotary_heads), ctx.cos, ctx.sin)
            query, entry = qkv.split([self.n_heads, 2 * self.n_kv_heads], dim=2)
            ctx.cache.append(layer, entry)
            mixed = ctx.cache.attend(layer, query, ctx.mask)
        return ctx.linear(self.out, mixed.reshape(batch, seq_len, -1))

    def heads(self, x_BTC: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        """The heads of queries, keys and values before RoPE, [B, T, N + 2 M, H] for M key heads."""
        qkv = self.qkv(x_BTC) if ctx is None else ctx.linear(self.qkv, x_BTC)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias.to(qkv.dtype)  # autocast's dtype, if it is on
        qkv = qkv.view(*x_BTC.shape[:2], -1, self.d_head)
        if self.query_norm is None or self.key_norm is None:
            return qkv
        sizes = [self.n_heads, self.n_kv_heads, self.n_kv_heads]
        query, key, value = qkv.split(sizes, dim=2)
        return torch.cat((self.query_norm(query), self.key_norm(key), value), dim=2)

"""Causal grouped-query attention (Ainslie et al. 2023) with rotary positions.

Shapes: B batch, T positions, S stored positions, C d_model, N heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from mtp_lightning.errors import UserError
from mtp_lightning.nn.auxiliary import AuxiliaryOutputs
from mtp_lightning.nn.components import AttentionConfig, check_whole
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.document_attention import MIN_WIDTH, block_mask, dense_mask, to_dense
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.ops import rotary, rotary_attention
from mtp_lightning.nn.rope import rope_table, rotate_in_place
from mtp_lightning.settings import require_bool

if TYPE_CHECKING:
    from mtp_lightning.nn.tree_cache import Branches, TreeCache


@dataclass(frozen=True)
class ForwardContext:
    """The state that all layers of one pass share: positions and mask of its tokens, the cache, and
    the collectors that layers report to.

    Attributes:
        cos, sin: rotary table, [T, 1, H/2]; with a cache over whole heads, [1 | B, T, 1, H].
        mask: bool [B, 1, T, S], True where a query attends to a key, or the same as a block mask;
            None is causal. With a cache, the mask that its ``attend`` expects.
        cache: keys and values to append to; None for a pass over whole windows.
        auxiliary: collects the layers' auxiliary outputs in training; None for none.
        kv_sink: receives every layer's index and what a cache would hold of a pass over whole
            windows, its rotated keys and values [B, T, M, H], as part of the autograd graph; None
            for none.
        updates: linear layer -> what is added to its output in this pass; None for none.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | BlockMask | None = None
    cache: Any = None
    auxiliary: AuxiliaryOutputs | None = None
    kv_sink: Callable[[int, Tensor], None] | None = None
    updates: Mapping[nn.Module, nn.Module] | None = None

    @staticmethod
    def of_window(
        config: TrunkConfig,
        seq_len: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        documents: Tensor | None = None,
        in_blocks: bool = False,
        auxiliary: AuxiliaryOutputs | None = None,
    ) -> ForwardContext:
        """The context of positions 0 .. ``seq_len`` - 1 of whole windows of a model of ``dtype``.

        Args:
            documents: ids [B, T]; tokens then attend only within their document.
            in_blocks: whether the mask may be a block mask (``document_attention.py``).
        """
        positions_T = torch.arange(seq_len, device=device)
        cos, sin = rope_table(positions_T, **config.rotary, dtype=dtype)
        mask: Tensor | BlockMask | None = None
        if documents is not None:
            in_blocks = in_blocks and config.attention.reads_blocks(config)
            mask = block_mask(documents) if in_blocks else dense_mask(documents)
        return ForwardContext(cos.unsqueeze(-2), sin.unsqueeze(-2), mask, auxiliary=auxiliary)

    @staticmethod
    def of_cache(cache: KVCache, starts: list[int], n_new: int) -> ForwardContext:
        """Open a pass of ``cache`` over the positions ``start .. start + n_new - 1`` of every row,
        with a rotary table for :func:`rotate_in_place`."""
        cache.open(starts, n_new)
        return _OpenPass(cache)

    @staticmethod
    def of_tree(cache: TreeCache, starts: list[int], branches: Branches) -> ForwardContext:
        """Open a pass of ``cache`` over a tree in every row, its first token at ``starts``."""
        cache.open_tree(starts, branches)
        return _OpenPass(cache)

    def dense_mask(self) -> Tensor:
        """The mask as bool [1 | B, 1, T, T], True where a query attends to a key."""
        if self.mask is None:
            size = len(self.cos)
            causal = torch.ones(size, size, dtype=torch.bool, device=self.cos.device).tril()
            return causal[None, None]
        return to_dense(self.mask) if isinstance(self.mask, BlockMask) else self.mask

    def repeated(self) -> ForwardContext:
        """The context for repeating this pass under activation recomputation: layers compute the
        same (autograd compares), but do not report a second time."""
        if self.auxiliary is None and self.kv_sink is None:
            return self
        auxiliary = None if self.auxiliary is None else AuxiliaryOutputs(keep=False)
        kv_sink = None if self.kv_sink is None else lambda layer, entry_BTMH: None
        return replace(self, auxiliary=auxiliary, kv_sink=kv_sink)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """``layer`` of ``x``, with its update."""
        return layer(x) if self.updates is None else layer(x) + self.updates[layer](x)


class _OpenPass(ForwardContext):
    """The open pass of a cache. It computes tables and mask when the first layer reads them. Fused
    passes never read them, and computing them would take a tenth of a small model's round."""

    cache: KVCache

    def __init__(self, cache: KVCache, **fields: Any) -> None:
        """``fields`` are those of :func:`dataclasses.replace`, which replace the cache's own."""
        # Bypasses the setters of a frozen dataclass.
        self.__dict__.update(fields, cache=cache)

    @cached_property
    def _angles(self) -> tuple[Tensor, Tensor]:
        return self.cache.angles()

    @cached_property
    def cos(self) -> Tensor:  # type: ignore[override]
        return self._angles[0]

    @cached_property
    def sin(self) -> Tensor:  # type: ignore[override]
        return self._angles[1]

    @cached_property
    def mask(self) -> Tensor | None:  # type: ignore[override]
        return self.cache.mask()


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

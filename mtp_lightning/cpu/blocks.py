"""Blocks of grouped-query attention and SwiGLU over a cache, in one call (``cpp/decode.cpp``).

Operator by operator, a block of a few tokens makes about twenty calls of Python and PyTorch, which
take most of the time of a pass in a narrow model. The arithmetic is that of the layers. The bits of
a token's result do not depend on other tokens of the pass, so a verify pass and single passes give
the same bits.

Shapes: B rows, T new positions, C d_model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import c_double, c_int64, c_void_p
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.packed import PackedStruct, packed_of
from mtp_lightning.nn.attention import Attention
from mtp_lightning.nn.batch_invariant import MAX_INVARIANT_POSITIONS, MAX_VERIFY_WIDTH
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.feed_forward import FeedForward
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.norm import RMSNorm


class BlockStruct(ctypes.Structure):
    """``Block`` of decode.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("width", "heads", "kv_heads", "head", "inner")),
        *((name, c_double) for name in ("eps", "head_eps")),
        *((name, c_void_p) for name in ("attention_norm", "feed_forward_norm")),
        *((name, c_void_p) for name in ("query_norm", "key_norm", "bias")),
        *((name, PackedStruct) for name in ("qkv", "out", "gate_up", "down")),
    )


class _PassStruct(ctypes.Structure):
    """``Pass`` of decode.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "length", "capacity")),
        *((name, c_void_p) for name in ("starts", "parents", "cos", "sin", "entries")),
    )


class _Passes:
    """The passes of a cache over ``n`` blocks from ``layer`` on as ``Pass`` of decode.cpp, one at a
    time. The cache's storage does not move while this object lives."""

    def __init__(self, cache: KVCache, layer: int, n: int) -> None:
        tables, stored = cache.tables, cache.entries_L_BSMH[layer : layer + n]
        self._alive = tables, (c_void_p * n)(*[x.data_ptr() for x in stored])
        self._starts = (c_int64 * cache.batch_size)()
        self._struct = _PassStruct(
            cache.batch_size,
            0,
            tables.capacity,
            ctypes.addressof(self._starts),
            None,
            tables.cos_S1H.data_ptr(),
            tables.sin_S1H.data_ptr(),
            ctypes.addressof(self._alive[1]),
        )
        self._address = ctypes.addressof(self._struct)

    def open(self, cache: KVCache) -> int:
        """The address of the open pass, until the next call."""
        self._starts[:] = cache.spans.starts  # type: ignore[assignment]
        self._struct.length = cache.spans.width
        self._struct.parents = None
        if (parents := cache.parents) is not None:
            self._parents = (c_int64 * len(parents))(*parents)
            self._struct.parents = ctypes.addressof(self._parents)
        return self._address


def open_pass(cache: KVCache, layer: int, n: int) -> int:
    """The address of a cache's open pass over ``n`` blocks from ``layer`` on, as ``Pass`` of
    decode.cpp; valid until the next such call."""
    key = "passes", layer, n
    if (passes := cache.derived.get(key)) is None:
        passes = cache.derived[key] = _Passes(cache, layer, n)
    return passes.open(cache)


class FusedBlocks:
    """Consecutive blocks whose weights are packed, each given by its struct and the tensors that
    the struct points to; ``last`` is the norm after them, if there is one."""

    def __init__(
        self, structs: Sequence[tuple[BlockStruct, list[Any]]], last: RMSNorm | None = None
    ) -> None:
        self.n = len(structs)
        self.array = (BlockStruct * self.n)(*(block for block, _ in structs))
        self._alive = [alive for _, alive in structs], last
        self.gain = None if last is None else last.weight.data_ptr()
        self.eps = 0.0 if last is None else last.eps

    @staticmethod
    def of(blocks: Iterable[nn.Module], last: nn.Module | None = None) -> FusedBlocks | None:
        """None if decode.cpp does not support a block's layers, or they are not packed."""
        structs = [_describe(block) for block in blocks]
        supported = [block for block in structs if block is not None]
        if not supported or len(supported) < len(structs) or not (last is None or is_plain(last)):
            return None
        return FusedBlocks(supported, last)

    def fits(self, x_BTC: Tensor, ctx: ForwardContext, layer: int = 0) -> bool:
        """Whether a pass has few tokens, writes to a cache, and uses the layers' own weights."""
        cache, (batch, n_new, _) = ctx.cache, x_BTC.shape
        few = n_new <= MAX_VERIFY_WIDTH or batch * n_new <= MAX_INVARIANT_POSITIONS
        if not (few and isinstance(cache, KVCache) and ctx.updates is None):
            return False
        has_layers = layer + self.n <= len(cache.entries_L_BSMH)  # if not, append refuses them
        return has_layers and native.fits(x_BTC, cache.tables.cos_S1H)

    def __call__(self, x_BTC: Tensor, ctx: ForwardContext, layer: int = 0) -> Tensor:
        """The blocks' output [B, T, C] for the tokens of a pass that :meth:`fits`, after the norm
        if there is one; ``layer`` is the index of the first block in the cache."""
        h_BTC = x_BTC.clone(memory_format=torch.contiguous_format)
        return self.in_place(h_BTC, ctx, layer)

    def in_place(self, h_BTC: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        """The same, with the output before the norm in the place of the input ``h_BTC``."""
        cache = ctx.cache
        assert isinstance(cache, KVCache)
        normed = h_BTC if self.gain is None else torch.empty_like(h_BTC)
        opened = open_pass(cache, layer, self.n)
        native.call("decode_blocks", self.array, self.n, opened, h_BTC, self.gain, normed, self.eps)
        return normed


def is_plain(norm: nn.Module) -> TypeGuard[RMSNorm]:
    """Whether decode.cpp supports this norm."""
    return type(norm) is RMSNorm and native.fits(norm.weight) and norm.weight.is_contiguous()


def dense_matrices(block: nn.Module) -> list[Tensor]:
    """The four matrices of a block with plain attention and a dense layer; none of another block's.
    Such a block only multiplies tokens by them."""
    assert isinstance(block, Block)
    attention, feed_forward = block.attention, block.feed_forward
    if type(attention) is not Attention or type(feed_forward) is not FeedForward:
        return []
    layers = (attention.qkv, attention.out, feed_forward.gate_up, feed_forward.down)
    return [layer.weight for layer in layers]


def _describe(block: nn.Module) -> tuple[BlockStruct, list[Any]] | None:
    """A block's struct and the tensors that it points to; None if it is not supported."""
    copies = [packed_of(matrix) for matrix in dense_matrices(block)]
    weights = [weight for weight in copies if weight is not None]
    if not weights or len(weights) < len(copies):
        return None
    assert isinstance(block, Block) and isinstance(block.attention, Attention)
    attention = block.attention
    bias, eps, head_norm = attention.qkv_bias, block.attention_norm.eps, attention.query_norm
    norms = (block.attention_norm, block.feed_forward_norm, head_norm, attention.key_norm)
    if not all(norm is None or is_plain(norm) for norm in norms):
        return None
    sizes = attention.n_heads, attention.n_kv_heads, attention.d_head
    struct = BlockStruct(
        weights[0].inputs,
        *sizes,
        weights[3].inputs,
        eps,
        eps if head_norm is None else head_norm.eps,
        *(None if norm is None else norm.weight.data_ptr() for norm in norms),
        None if bias is None else bias.data_ptr(),
        *(weight.struct for weight in weights),
    )
    return struct, [*weights, *norms, bias]

"""Narrow passes of decoding through whole blocks in one call (``kernels/cpp/narrow.cpp``).

Called operator by operator, a block of a few tokens is some twenty calls of Python and PyTorch, and
a narrow model's pass little else. The arithmetic is that of the layers; a token's result depends on
no other that is computed with it, so that verify passes give the bits of single ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.nn.attention import Attention, Positions
from mtp_lightning.nn.feed_forward import FeedForward
from mtp_lightning.nn.kernels import native
from mtp_lightning.nn.kernels.exact import FEW
from mtp_lightning.nn.kernels.few_rows import FewRows
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.norm import RMSNorm


class _Block(ctypes.Structure):
    """``Block`` of narrow.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("width", "heads", "kv_heads", "head", "inner", "half")),
        *((name, c_double) for name in ("eps", "head_eps")),
        *((name, c_void_p) for name in ("attention_norm", "feed_forward_norm")),
        *((name, c_void_p) for name in ("query_norm", "key_norm", "bias")),
        *((name, c_void_p) for name in ("qkv", "out", "gate_up", "down")),
    )


class _Pass(ctypes.Structure):
    """``Pass`` of narrow.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "length", "capacity")),
        *((name, c_void_p) for name in ("starts", "cos", "sin", "entries")),
    )


class NarrowBlocks:
    """Blocks in a row, with packed weights.

    Args:
        described: one for each of them.
    """

    def __init__(self, described: Sequence[_Block]) -> None:
        self._n = len(described)
        self._blocks = (_Block * self._n)(*described)

    @staticmethod
    def of(blocks: Sequence[Any]) -> NarrowBlocks | None:
        """None where one of them is of other layers than narrow.cpp knows, or not packed."""
        described = [_describe(block) for block in blocks]
        if not described or None in described:
            return None
        return NarrowBlocks([block for block in described if block is not None])

    def fits(self, x_BTC: Tensor, positions: Positions) -> bool:
        """Whether a pass is narrow, over a cache."""
        cache = positions.cache
        return (
            x_BTC.shape[1] <= FEW
            and isinstance(cache, KVCache)
            and native.fits(x_BTC, cache.tables.cos_S1H)
        )

    def __call__(self, x_BTC: Tensor, positions: Positions, layer: int) -> Tensor:
        """[B, T, C] -> [B, T, C].

        Args:
            x_BTC: new tokens; not written to.
            positions: of a pass that :meth:`fits`.
            layer: place of the first block in the cache.
        """
        cache = positions.cache
        assert isinstance(cache, KVCache)
        batch, n_new, _ = x_BTC.shape
        tables = cache.tables
        entries = cache.entries_L_BSMH[layer : layer + self._n]
        starts = (c_int64 * batch)(*cache.starts)
        pointers = (c_void_p * self._n)(*[x.data_ptr() for x in entries])
        over = _Pass(
            batch,
            n_new,
            tables.capacity,
            ctypes.addressof(starts),
            tables.cos_S1H.data_ptr(),
            tables.sin_S1H.data_ptr(),
            ctypes.addressof(pointers),
        )
        h_BTC = x_BTC.clone(memory_format=torch.contiguous_format)
        native.lib().narrow_blocks(self._blocks, self._n, ctypes.byref(over), h_BTC.data_ptr())
        return h_BTC


def _describe(block: Any) -> _Block | None:
    attention, feed_forward = block.attention, block.feed_forward
    if type(attention) is not Attention or type(feed_forward) is not FeedForward:
        return None
    matrices = (attention.qkv, attention.out, feed_forward.gate_up, feed_forward.down)
    packed = [m.packed for m in matrices if isinstance(m.packed, FewRows)]
    if len(packed) < len(matrices) or len({weight.half for weight in packed}) > 1:
        return None
    norms = (
        block.attention_norm,
        block.feed_forward_norm,
        attention.query_norm,
        attention.key_norm,
    )
    if not all(norm is None or _is_plain(norm) for norm in norms):
        return None
    qkv = packed[0]
    gains = [None if norm is None else norm.weight.data_ptr() for norm in norms]
    bias = attention.qkv_bias
    return _Block(
        qkv.inputs,
        attention.n_heads,
        attention.n_kv_heads,
        attention.d_head,
        packed[3].inputs,
        qkv.half,
        block.attention_norm.eps,
        block.attention_norm.eps if attention.query_norm is None else attention.query_norm.eps,
        *gains,
        None if bias is None else bias.data_ptr(),
        *(weight.numbers.data_ptr() for weight in packed),
    )


def _is_plain(norm: nn.Module) -> bool:
    return type(norm) is RMSNorm and native.fits(norm.weight) and norm.weight.is_contiguous()

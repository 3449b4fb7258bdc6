"""Narrow passes of decoding through whole blocks in one call (``kernels/cpp/narrow.cpp``).

Called operator by operator, a block of a few tokens is some twenty calls of Python and PyTorch, and
a narrow model's pass little else. The arithmetic is that of the layers; a token's result depends on
no other that is computed with it, so that verify passes give the bits of single ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from mtp_lightning.nn.attention import Attention, Positions
from mtp_lightning.nn.feed_forward import FeedForward
from mtp_lightning.nn.kernels import native
from mtp_lightning.nn.kernels.exact import FEW
from mtp_lightning.nn.kernels.few_rows import FewRows
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.norm import RMSNorm

# So many tokens cost no more here than layer by layer: those of a short prompt, or what modules
# have to catch up with.
_MOST_TOKENS = 512


class Block(ctypes.Structure):
    """``Block`` of narrow.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("width", "heads", "kv_heads", "head", "inner", "kind")),
        *((name, c_double) for name in ("eps", "head_eps")),
        *((name, c_void_p) for name in ("attention_norm", "feed_forward_norm")),
        *((name, c_void_p) for name in ("query_norm", "key_norm", "bias")),
        *((name, c_void_p) for name in ("qkv", "out", "gate_up", "down")),
    )


class _Join(ctypes.Structure):
    """``Join`` of narrow.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("width", "kind", "hidden_first")),
        *((name, c_double) for name in ("embedded_eps", "hidden_eps")),
        *((name, c_void_p) for name in ("embedded_norm", "hidden_norm", "projection")),
    )


class _Pass(ctypes.Structure):
    """``Pass`` of narrow.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "length", "capacity")),
        *((name, c_void_p) for name in ("starts", "parents", "cos", "sin", "entries")),
    )


class OpenPass:
    """A cache's open pass as ``Pass`` of narrow.cpp, alive for as long as this object.

    Args:
        cache: opened.
        layer: place of the first block in it.
        n: blocks.
    """

    def __init__(self, cache: KVCache, layer: int, n: int) -> None:
        tables, starts = cache.tables, cache.starts
        entries = cache.addresses.get((layer, n))
        if entries is None:
            stored = cache.entries_L_BSMH[layer : layer + n]
            entries = cache.addresses[layer, n] = (c_void_p * n)(*[x.data_ptr() for x in stored])
        self._starts = (c_int64 * len(starts))(*starts)
        parents = cache.parents
        self._parents = None if parents is None else (c_int64 * len(parents))(*parents)
        self._pass = _Pass(
            len(starts),
            cache.runs.width,
            tables.capacity,
            ctypes.addressof(self._starts),
            None if self._parents is None else ctypes.addressof(self._parents),
            tables.cos_S1H.data_ptr(),
            tables.sin_S1H.data_ptr(),
            ctypes.addressof(entries),
        )
        self.address = ctypes.addressof(self._pass)


class NarrowBlocks:
    """Blocks in a row, with packed weights.

    Args:
        described: one for each of them, and what its addresses are of.
        last: the norm behind them, if there is one.
    """

    def __init__(
        self, described: Sequence[tuple[Block, list[Any]]], last: RMSNorm | None = None
    ) -> None:
        self.n = len(described)
        self.array = (Block * self.n)(*(block for block, _ in described))
        self._alive = [alive for _, alive in described], last
        self.gain = None if last is None else last.weight.data_ptr()
        self.eps = 0.0 if last is None else last.eps

    @staticmethod
    def of(blocks: Sequence[Any], last: nn.Module | None = None) -> NarrowBlocks | None:
        """None where one of them is of other layers than narrow.cpp knows, or not packed."""
        described = [_describe(block) for block in blocks]
        known = [block for block in described if block is not None]
        if not known or len(known) < len(described) or not (last is None or _is_plain(last)):
            return None
        return NarrowBlocks(known, last)

    def fits(self, x_BTC: Tensor, positions: Positions) -> bool:
        """Whether a pass is narrow, over a cache."""
        cache = positions.cache
        batch, n_new, _ = x_BTC.shape
        return (
            (n_new <= FEW or batch * n_new <= _MOST_TOKENS)
            and isinstance(cache, KVCache)
            and native.fits(x_BTC, cache.tables.cos_S1H)
        )

    def __call__(
        self, x_BTC: Tensor, positions: Positions, layer: int = 0
    ) -> tuple[Tensor, Tensor]:
        """What the blocks make of new tokens [B, T, C], and its norm; without a norm, itself.

        Args:
            x_BTC: not written to.
            positions: of a pass that :meth:`fits`.
            layer: place of the first block in the cache.
        """
        return self._through(x_BTC.clone(memory_format=torch.contiguous_format), positions, layer)

    def _through(self, h_BTC: Tensor, positions: Positions, layer: int) -> tuple[Tensor, Tensor]:
        """In the place of ``h_BTC``."""
        cache = positions.cache
        assert isinstance(cache, KVCache)
        over = OpenPass(cache, layer, self.n)
        normed = h_BTC if self.gain is None else torch.empty_like(h_BTC)
        native.lib().narrow_blocks(
            self.array, self.n, over.address, h_BTC.data_ptr(), self.gain,
            normed.data_ptr(), self.eps,
        )  # fmt: skip
        return h_BTC, normed


class NarrowModule:
    """A sequential module: the norms of its two inputs, their projection, a block, a norm."""

    def __init__(self, join: _Join, blocks: NarrowBlocks, alive: tuple[Any, ...]) -> None:
        self.join = join
        self.blocks = blocks
        self._alive = alive  # what the addresses of ``join`` are of

    @staticmethod
    def of(
        enorm: nn.Module,
        hnorm: nn.Module,
        projection: Linear,
        block: nn.Module,
        norm: nn.Module,
        *,
        hidden_first: bool,
    ) -> NarrowModule | None:
        """None where narrow.cpp does not know its layers, or they are not packed."""
        blocks, weight = NarrowBlocks.of([block], norm), projection.packed
        if blocks is None or not isinstance(weight, FewRows):
            return None
        if not (_is_plain(enorm) and _is_plain(hnorm)):
            return None
        gains = enorm.weight.data_ptr(), hnorm.weight.data_ptr()
        join = _Join(
            weight.outputs, weight.kind, hidden_first, enorm.eps, hnorm.eps, *gains,
            weight.numbers.data_ptr(),
        )  # fmt: skip
        return NarrowModule(join, blocks, (enorm, hnorm, weight))

    def fits(self, hidden_BTC: Tensor, embedded_BTC: Tensor, positions: Positions) -> bool:
        """Whether a pass is narrow, over a cache."""
        return self.blocks.fits(embedded_BTC, positions) and native.fits(hidden_BTC)

    def __call__(self, hidden_BTC: Tensor, embedded_BTC: Tensor, positions: Positions) -> Tensor:
        """[B, T, C] of both -> [B, T, C]."""
        hidden, embedded = hidden_BTC.contiguous(), embedded_BTC.contiguous()
        h_BTC = torch.empty_like(hidden)
        native.lib().narrow_join(
            ctypes.byref(self.join), embedded.data_ptr(), hidden.data_ptr(), h_BTC.data_ptr(),
            hidden.shape[0] * hidden.shape[1],
        )  # fmt: skip
        return self.blocks._through(h_BTC, positions, 0)[1]


def _describe(block: Any) -> tuple[Block, list[Any]] | None:
    """A block, and what its addresses are of."""
    attention, feed_forward = block.attention, block.feed_forward
    if type(attention) is not Attention or type(feed_forward) is not FeedForward:
        return None
    matrices = (attention.qkv, attention.out, feed_forward.gate_up, feed_forward.down)
    packed = [m.packed for m in matrices if isinstance(m.packed, FewRows)]
    if len(packed) < len(matrices) or len({weight.kind for weight in packed}) > 1:
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
    described = Block(
        qkv.inputs,
        attention.n_heads,
        attention.n_kv_heads,
        attention.d_head,
        packed[3].inputs,
        qkv.kind,
        block.attention_norm.eps,
        block.attention_norm.eps if attention.query_norm is None else attention.query_norm.eps,
        *gains,
        None if bias is None else bias.data_ptr(),
        *(weight.numbers.data_ptr() for weight in packed),
    )
    return described, [*packed, *norms, bias]


def _is_plain(norm: nn.Module) -> TypeGuard[RMSNorm]:
    return type(norm) is RMSNorm and native.fits(norm.weight) and norm.weight.is_contiguous()

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


class _Block(ctypes.Structure):
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


class _Draft(ctypes.Structure):
    """``Draft`` of narrow.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("ahead", "outputs", "kind")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("join", "block", "gain", "embedding", "head")),
    )


class _Trunk(ctypes.Structure):
    """``Trunk`` of narrow.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("blocks", "outputs", "kind")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("block", "gain", "embedding", "head")),
    )


class _Pass(ctypes.Structure):
    """``Pass`` of narrow.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "length", "capacity")),
        *((name, c_void_p) for name in ("starts", "parents", "cos", "sin", "entries")),
    )


class _Over:
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
        described: one for each of them.
        last: the norm behind them, if there is one.
    """

    def __init__(self, described: Sequence[_Block], last: RMSNorm | None = None) -> None:
        self._n = len(described)
        self._blocks = (_Block * self._n)(*described)
        self._gain = None if last is None else last.weight.data_ptr()
        self._eps = 0.0 if last is None else last.eps

    @staticmethod
    def of(blocks: Sequence[Any], last: nn.Module | None = None) -> NarrowBlocks | None:
        """None where one of them is of other layers than narrow.cpp knows, or not packed."""
        described = [_describe(block) for block in blocks]
        if not described or None in described or not (last is None or _is_plain(last)):
            return None
        return NarrowBlocks([block for block in described if block is not None], last)

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
        over = _Over(cache, layer, self._n)
        normed = h_BTC if self._gain is None else torch.empty_like(h_BTC)
        native.lib().narrow_blocks(
            self._blocks, self._n, over.address, h_BTC.data_ptr(), self._gain,
            normed.data_ptr(), self._eps,
        )  # fmt: skip
        return h_BTC, normed


class NarrowModule:
    """A sequential module: the norms of its two inputs, their projection, a block, a norm."""

    def __init__(self, join: _Join, blocks: NarrowBlocks) -> None:
        self._join = join
        self._blocks = blocks

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
        return NarrowModule(join, blocks)

    def fits(self, hidden_BTC: Tensor, embedded_BTC: Tensor, positions: Positions) -> bool:
        """Whether a pass is narrow, over a cache."""
        return self._blocks.fits(embedded_BTC, positions) and native.fits(hidden_BTC)

    def __call__(self, hidden_BTC: Tensor, embedded_BTC: Tensor, positions: Positions) -> Tensor:
        """[B, T, C] of both -> [B, T, C]."""
        hidden, embedded = hidden_BTC.contiguous(), embedded_BTC.contiguous()
        h_BTC = torch.empty_like(hidden)
        native.lib().narrow_join(
            ctypes.byref(self._join), embedded.data_ptr(), hidden.data_ptr(), h_BTC.data_ptr(),
            hidden.shape[0] * hidden.shape[1],
        )  # fmt: skip
        return self._blocks._through(h_BTC, positions, 0)[1]


class NarrowTrunk:
    """A trunk from token ids to logits, in one call.

    Args:
        before: all blocks but the last, packed.
        last: the last with the norm, packed.
        head: its weight, packed.
        embedding: [V, C].
    """

    def __init__(
        self, before: NarrowBlocks, last: NarrowBlocks, head: FewRows, embedding: Tensor
    ) -> None:
        self._n = before._n + 1
        self._blocks = (_Block * self._n)(*before._blocks, *last._blocks)
        self._alive = before, last, head, embedding
        self._outputs = head.outputs
        self._trunk = _Trunk(
            self._n, head.outputs, head.kind, last._eps, ctypes.addressof(self._blocks), last._gain,
            embedding.data_ptr(), head.numbers.data_ptr(),
        )  # fmt: skip
        self._address = ctypes.addressof(self._trunk)

    @staticmethod
    def of(packed: Any, head: Any, embedding: Tensor) -> NarrowTrunk | None:
        """None where one of them is not packed, or not of fp32 on a CPU."""
        if packed is None or not isinstance(head, FewRows):
            return None
        if not (native.fits(embedding) and embedding.is_contiguous()):
            return None
        before, last = packed
        return NarrowTrunk(before, last, head, embedding)

    def __call__(self, cache: KVCache, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The states before the last block, behind it and behind the norm, [3, B, T, C], and the
        logits [B, T, V].

        Args:
            cache: the trunk's, opened for a pass.
            ids_BS: all token ids, of the cache's capacity.
        """
        over, embedding = _Over(cache, 0, self._n), self._alive[-1]
        shape = ids_BS.shape[0], cache.runs.width
        states = embedding.new_empty(3, *shape, embedding.shape[1])
        logits_BTV = embedding.new_empty(*shape, self._outputs)
        size = 4 * states[0].numel()
        address = states.data_ptr()
        native.lib().narrow_trunk(
            self._address, over.address, ids_BS.data_ptr(), address, address + size,
            address + 2 * size, logits_BTV.data_ptr(),
        )  # fmt: skip
        return states, logits_BTV


class NarrowDraft:
    """A sequential module from token ids to logits, in one call.

    Args:
        module: packed.
        head: its weight, packed.
        embedding: [V, C].
        ahead: how many places on the tokens stand that the module reads.
    """

    def __init__(
        self, module: NarrowModule, head: FewRows, embedding: Tensor, *, ahead: int
    ) -> None:
        self._alive = module, head, embedding
        self._outputs = head.outputs
        blocks = module._blocks
        self._draft = _Draft(
            ahead, head.outputs, head.kind, blocks._eps, ctypes.addressof(module._join),
            ctypes.addressof(blocks._blocks), blocks._gain, embedding.data_ptr(),
            head.numbers.data_ptr(),
        )  # fmt: skip
        self._address = ctypes.addressof(self._draft)

    @staticmethod
    def of(module: Any, head: Any, embedding: Tensor, *, ahead: int) -> NarrowDraft | None:
        """None where one of them is not packed, or not of fp32 on a CPU."""
        if not (isinstance(module, NarrowModule) and isinstance(head, FewRows)):
            return None
        if not (native.fits(embedding) and embedding.is_contiguous()):
            return None
        return NarrowDraft(module, head, embedding, ahead=ahead)

    def __call__(
        self,
        cache: KVCache,
        ids_BS: Tensor,
        before_BSC: Tensor,
        after_BSC: Tensor | None,
        newest: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """The logits [B, V] of one token a row, and the state [B, 1, C] that they are made of.

        Args:
            cache: the depth's, opened for a pass.
            ids_BS: all token ids; like the next two, of the cache's capacity.
            before_BSC: the states that the module reads.
            after_BSC: where its own go; None of the deepest.
            newest: of every row the place of that token in the pass.
        """
        batch, over = len(newest), _Over(cache, 0, 1)
        places = (c_int64 * batch)(*newest)
        state_B1C = before_BSC.new_empty(batch, 1, before_BSC.shape[-1])
        logits_BV = before_BSC.new_empty(batch, self._outputs)
        native.lib().narrow_draft(
            self._address,
            over.address,
            ids_BS.data_ptr(),
            before_BSC.data_ptr(),
            None if after_BSC is None else after_BSC.data_ptr(),
            ctypes.addressof(places),
            state_B1C.data_ptr(),
            logits_BV.data_ptr(),
        )
        return state_B1C, logits_BV


def _describe(block: Any) -> _Block | None:
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
    return _Block(
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


def _is_plain(norm: nn.Module) -> TypeGuard[RMSNorm]:
    return type(norm) is RMSNorm and native.fits(norm.weight) and norm.weight.is_contiguous()

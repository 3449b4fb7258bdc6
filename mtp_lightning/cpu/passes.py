"""Fused decode steps from token ids to logits, in one call each (``cpp/decode.cpp``).

Besides its arithmetic, a pass of few tokens costs calls: of Python, of modules, and of operators
that look up, copy and select. The results have the same bits as layer by layer.

Shapes: B rows, T new positions, S capacity, C d_model, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.blocks import FusedBlocks, is_plain, open_pass
from mtp_lightning.cpu.packed import PackedStruct, PackedWeight, only_copy, packed_of
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.sequential import SequentialModule
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.kv_cache import KVCache


class _JoinStruct(ctypes.Structure):
    """``Join`` of decode.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("width", "hidden_first")),
        *((name, c_double) for name in ("embedded_eps", "hidden_eps")),
        *((name, c_void_p) for name in ("embedded_norm", "hidden_norm")),
        ("projection", PackedStruct),
    )


class _EmbeddingStruct(ctypes.Structure):
    """``Embedding`` of decode.cpp."""

    _fields_ = (("rows", c_void_p), ("packed", PackedStruct), ("size", c_int64))


def _embedding(weight_VC: Tensor) -> _EmbeddingStruct:
    """It points to the weight, or to its packed copy, and does not keep them alive."""
    packed = only_copy(weight_VC)
    if packed is None:
        return _EmbeddingStruct(weight_VC.data_ptr())
    return _EmbeddingStruct(None, packed.struct, packed.outputs)


class _DecoderStruct(ctypes.Structure):
    """``Decoder`` of decode.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("blocks", "outputs")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("block", "gain")),
        ("embedding", _EmbeddingStruct),
        ("head", PackedStruct),
    )


class _DraftStruct(_DecoderStruct):
    """``Draft`` of decode.cpp."""

    _fields_ = (("ahead", c_int64), ("join", c_void_p))


class _TrunkStruct(_DecoderStruct):
    """``Trunk`` of decode.cpp."""

    _fields_ = (("branch", c_int64),)


def _decoder(blocks: FusedBlocks, head: PackedWeight, embedding: Tensor) -> tuple[Any, ...]:
    """The values of ``Decoder``, which point to these objects and do not keep them alive."""
    array = ctypes.addressof(blocks.array)
    ends = _embedding(embedding), head.struct
    return blocks.n, head.outputs, blocks.eps, array, blocks.gain, *ends


class FusedModule:
    """A sequential module: the norms of its two inputs, their projection, its blocks, a norm."""

    def __init__(self, join: _JoinStruct, blocks: FusedBlocks, alive: tuple[object, ...]) -> None:
        self.join = join
        self.blocks = blocks
        self._alive = alive  # the tensors that ``join`` points to

    @staticmethod
    def of(module: SequentialModule) -> FusedModule | None:
        """None if decode.cpp does not support the module's layers, or they are not packed."""
        blocks = FusedBlocks.of(module.blocks, module.norm)
        weight, enorm, hnorm = packed_of(module.eh_proj.weight), module.enorm, module.hnorm
        if blocks is None or weight is None or not (is_plain(enorm) and is_plain(hnorm)):
            return None
        gains = enorm.weight.data_ptr(), hnorm.weight.data_ptr()
        join = _JoinStruct(
            weight.outputs, module.hidden_first, enorm.eps, hnorm.eps, *gains, weight.struct,
        )  # fmt: skip
        return FusedModule(join, blocks, (enorm, hnorm, weight))

    def fits(self, hidden_BTC: Tensor, embedded_BTC: Tensor, ctx: ForwardContext) -> bool:
        """Whether a pass has few tokens and writes to a cache."""
        return self.blocks.fits(embedded_BTC, ctx) and native.fits(hidden_BTC)

    def __call__(self, hidden_BTC: Tensor, embedded_BTC: Tensor, ctx: ForwardContext) -> Tensor:
        """Hidden states and embeddings [B, T, C] -> [B, T, C]."""
        hidden, embedded = hidden_BTC.contiguous(), embedded_BTC.contiguous()
        h_BTC = torch.empty_like(hidden)
        rows = hidden.shape[0] * hidden.shape[1]
        native.call("decode_join", ctypes.byref(self.join), embedded, hidden, h_BTC, rows)
        return self.blocks.in_place(h_BTC, ctx, 0)


class FusedTrunk:
    """A :class:`~mtp_lightning.decoding.fused.TrunkPass` of the blocks with the final norm, a
    packed head and the embedding [V, C], for a stack of ``config``."""

    def __init__(
        self, blocks: FusedBlocks, head: PackedWeight, embedding: Tensor, config: MTPConfig
    ) -> None:
        self._alive = blocks, head, embedding
        # ``Branch`` of decode.cpp: the state that the stack reads.
        state = 2 * (config.branch == "final") + (config.input_norm == "post")
        self._trunk = _TrunkStruct(*_decoder(blocks, head, embedding), state)
        self._address = ctypes.addressof(self._trunk)

    def __call__(self, cache: KVCache, ids_BS: Tensor, states_BSC: Tensor | None) -> Tensor:
        sizes = ids_BS.shape[0], cache.spans.width, self._trunk.outputs
        logits_BTV = self._alive[-1].new_empty(sizes)
        opened = open_pass(cache, 0, self._trunk.blocks)
        native.call("decode_trunk", self._address, opened, ids_BS, states_BSC, logits_BTV)
        return logits_BTV


class FusedDraft:
    """A :class:`~mtp_lightning.decoding.fused.DraftPass` of a sequential module, with a packed head
    and the embedding [V, C]. The module reads the token ``ahead`` positions after its own."""

    def __init__(
        self, module: FusedModule, head: PackedWeight, embedding: Tensor, *, ahead: int
    ) -> None:
        self._alive = module, head, embedding
        join = ctypes.addressof(module.join)
        self._draft = _DraftStruct(*_decoder(module.blocks, head, embedding), ahead, join)
        self._address = ctypes.addressof(self._draft)

    def __call__(
        self,
        cache: KVCache,
        ids_BS: Tensor,
        before_BSC: Tensor,
        after_BSC: Tensor | None,
        newest: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        batch = len(newest)
        indices = (c_int64 * batch)(*newest)
        state_B1C = before_BSC.new_empty(batch, 1, before_BSC.shape[-1])
        logits_BV = before_BSC.new_empty(batch, self._draft.outputs)
        opened = open_pass(cache, 0, self._draft.blocks)
        states = before_BSC, after_BSC, indices, state_B1C
        native.call("decode_draft", self._address, opened, ids_BS, *states, logits_BV)
        return state_B1C, logits_BV

"""Whole narrow passes of decoding, from token ids to logits, in one call each.

What a pass of few tokens takes beside its arithmetic is calling: Python, modules, and operators
that look up, copy and choose. The numbers are those of the layers, bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from typing import Any

from torch import Tensor

from mtp_lightning.nn.kernels import native
from mtp_lightning.nn.kernels.few_rows import FewRows
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.narrow import Block, NarrowBlocks, NarrowModule, OpenPass


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
        *((name, c_int64) for name in ("blocks", "outputs", "kind", "kept")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("block", "gain", "embedding", "head")),
    )


def _are_known(head: Any, embedding: Tensor) -> bool:
    """Whether a head is packed, and an embedding as the calls read it."""
    return isinstance(head, FewRows) and native.fits(embedding) and embedding.is_contiguous()


class NarrowTrunk:
    """A trunk from token ids to logits, in one call.

    Args:
        before: all blocks but the last, packed.
        last: the last with the norm, packed.
        head: its weight, packed.
        embedding: [V, C].
        kept: ``Kept`` of narrow.cpp: which of its states the modules start from.
    """

    def __init__(
        self,
        before: NarrowBlocks,
        last: NarrowBlocks,
        head: FewRows,
        embedding: Tensor,
        *,
        kept: int,
    ) -> None:
        self._n = before.n + 1
        self._blocks = (Block * self._n)(*before.array, *last.array)
        self._alive = before, last, head, embedding
        self._outputs = head.outputs
        self._trunk = _Trunk(
            self._n, head.outputs, head.kind, kept, last.eps, ctypes.addressof(self._blocks),
            last.gain, embedding.data_ptr(), head.numbers.data_ptr(),
        )  # fmt: skip
        self._address = ctypes.addressof(self._trunk)

    @staticmethod
    def of(packed: Any, head: Any, embedding: Tensor, *, kept: int) -> NarrowTrunk | None:
        """None where one of them is not packed, or not of fp32 on a CPU."""
        if packed is None or not _are_known(head, embedding):
            return None
        before, last = packed
        return NarrowTrunk(before, last, head, embedding, kept=kept)

    def __call__(self, cache: KVCache, ids_BS: Tensor, states_BSC: Tensor | None) -> Tensor:
        """The logits [B, T, V].

        Args:
            cache: the trunk's, opened for a pass.
            ids_BS: all token ids; like the next, of the cache's capacity.
            states_BSC: where those go that the modules start from; None without modules.
        """
        over = OpenPass(cache, 0, self._n)
        logits_BTV = self._alive[-1].new_empty(ids_BS.shape[0], cache.runs.width, self._outputs)
        native.lib().narrow_trunk(
            self._address,
            over.address,
            ids_BS.data_ptr(),
            None if states_BSC is None else states_BSC.data_ptr(),
            logits_BTV.data_ptr(),
        )
        return logits_BTV


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
        blocks = module.blocks
        self._draft = _Draft(
            ahead, head.outputs, head.kind, blocks.eps, ctypes.addressof(module.join),
            ctypes.addressof(blocks.array), blocks.gain, embedding.data_ptr(),
            head.numbers.data_ptr(),
        )  # fmt: skip
        self._address = ctypes.addressof(self._draft)

    @staticmethod
    def of(module: Any, head: Any, embedding: Tensor, *, ahead: int) -> NarrowDraft | None:
        """None where one of them is not packed, or not of fp32 on a CPU."""
        if not (isinstance(module, NarrowModule) and _are_known(head, embedding)):
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
        batch, over = len(newest), OpenPass(cache, 0, 1)
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

"""A model's fused decode steps on a CPU, and its packed weights, for as long as it decodes.

While a model decodes, every matrix that multiplies tokens has a packed copy (``packed.py``), and
the ``forward`` of every trunk, sequential module and block with layers that ``cpp/decode.cpp``
supports is replaced, on that object, by one that computes a pass of few tokens in one call. So a
stack without a fused pass still has fast blocks. Other classes, users' subclasses included, keep
their own forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.blocks import FusedBlocks
from mtp_lightning.cpu.packed import PackedWeight, first_rows, pack, packed_of, unpack, use_integers
from mtp_lightning.cpu.passes import FusedDraft, FusedModule, FusedTrunk
from mtp_lightning.decoding.fused import TrunkPass
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.mtp.sequential import SequentialModule, SequentialMTP
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.trunk import Trunk, TrunkOutput

# Layers whose weight is multiplied as a matrix.
_MATRICES = (Linear, Head)


class Prepared:
    """A module with packed weights and fused blocks, until :meth:`close`."""

    def __init__(self, module: nn.Module) -> None:
        layers = list(module.modules())
        self._weights = [m.weight for m in layers if isinstance(m, _MATRICES)]
        for weight in self._weights:
            pack(weight)
        self._replaced = [layer for layer in layers if type(layer) in _FUSED]
        for layer in self._replaced:
            vars(layer)["forward"] = _forward(layer)

    def close(self) -> None:
        """Restore the module, except for weights that are only packed."""
        for layer in self._replaced:
            del vars(layer)["forward"]
        for weight in self._weights:
            unpack(weight)


def multiply_integers(model: MTPModel) -> str | None:
    """``multiply_integers`` of ``decoding/fused.py``."""
    if native.library is None:
        return native.NEEDED
    if not native.lib().multiplies_bytes():
        return native.NEEDED_FOR_INTEGERS
    if not use_integers(m.weight for m in model.modules() if isinstance(m, _MATRICES)):
        return (
            "weights in blocks of 4 or 8 bits: a GGUF file of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 (of "
            "K-quants in generate.py, serve.py and certify alone), or precision=int4"
        )
    return None


class CPUPasses(Prepared):
    """The :class:`~mtp_lightning.decoding.fused.FusedPasses` of a model on a CPU."""

    first_rows = staticmethod(first_rows)

    def __init__(self, model: MTPModel) -> None:
        super().__init__(model)
        self._model = model
        self.trunk: TrunkPass | None = self._trunk()

    def draft(self, k: int, weight_VC: Tensor) -> FusedDraft | None:
        stack = self._model.mtp
        if type(stack) is not SequentialMTP or stack.config.token_dropout == 1:
            return None
        layer = stack.module(k)
        module = FusedModule.of(layer) if type(layer) is SequentialModule else None
        pair = self._head_and_embedding(weight_VC)
        return None if module is None or pair is None else FusedDraft(module, *pair, ahead=k)

    def _trunk(self) -> FusedTrunk | None:
        trunk, stack = self._model.trunk, self._model.mtp
        # A stack that overrides main_state or branch gives the head or the depths another state.
        plain = (
            type(trunk) is Trunk
            and type(stack).main_state is MTPStack.main_state
            and type(stack).branch is MTPStack.branch
        )
        blocks = FusedBlocks.of(trunk.blocks, trunk.norm) if plain else None
        pair = self._head_and_embedding(self._model.head.weight)
        if blocks is None or pair is None:
            return None
        return FusedTrunk(blocks, *pair, stack.config)

    def _head_and_embedding(self, weight_VC: Tensor) -> tuple[PackedWeight, Tensor] | None:
        """A head's packed weight and the embedding; None if decode.cpp does not support them."""
        head, embedding = packed_of(weight_VC), self._model.trunk.embedding.weight
        if head is None or not (native.fits(embedding) and embedding.is_contiguous()):
            return None
        return head, embedding


def _forward(layer: nn.Module) -> Callable[..., Any]:
    """A layer's forward pass, which is fused for a pass of few tokens. The fused code is built at
    the first pass: most layers need none of their own, since a layer around them is fused."""
    build = cache(partial(_FUSED[type(layer)], layer))

    def forward(*args: Any, **named: Any) -> Any:
        fused = None if torch.compiler.is_compiling() else build()
        if fused is None or not fused.fits(*args, **named):
            return type(layer).forward(layer, *args, **named)
        return fused(*args, **named)

    return forward


class _WholeTrunk:
    """All blocks of a trunk, in parts that end at the states that its stack may read."""

    def __init__(self, parts: Sequence[FusedBlocks], kept: Collection[int]) -> None:
        self._parts, self._kept = parts, kept
        self.fits = parts[0].fits

    @classmethod
    def of(cls, trunk: Trunk) -> _WholeTrunk | None:
        *before, end = sorted({0, *trunk.keep_after, len(trunk.blocks) - 1, len(trunk.blocks)})
        parts = [FusedBlocks.of(trunk.blocks[i:j]) for i, j in pairwise(before)]
        parts.append(FusedBlocks.of(trunk.blocks[before[-1] : end], trunk.norm))
        supported = [part for part in parts if part is not None]
        return cls(supported, trunk.keep_after) if len(supported) == len(parts) else None

    def __call__(self, embedded_BTC: Tensor, ctx: ForwardContext) -> TrunkOutput:
        states, end = {0: embedded_BTC}, 0  # number of blocks -> the state after them
        for part in self._parts:
            h_BTC = states[end].clone(memory_format=torch.contiguous_format)
            final_BTC = part.in_place(h_BTC, ctx, end)
            end += part.n
            states[end] = h_BTC
        after = {n: states[n] for n in self._kept}
        return TrunkOutput(final_BTC, states[end], states[end - 1], after)


# The fused code of a layer's passes of few tokens; None if decode.cpp does not support the layer,
# or a weight is not packed.
_FUSED: dict[type[nn.Module], Callable[[Any], FusedBlocks | FusedModule | _WholeTrunk | None]] = {
    Trunk: _WholeTrunk.of,
    SequentialModule: FusedModule.of,
    Block: lambda block: FusedBlocks.of([block]),
}

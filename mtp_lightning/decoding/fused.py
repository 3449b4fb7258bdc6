"""Fused decode steps: one call for a whole pass over a few tokens, where a part has code for it.

A part registers its code for a device type. Code that decodes enters :func:`fused_passes`, which
prepares the model; a session then gets the passes from :func:`fused`. A pass that the part does not
provide runs through the model's modules.

Shapes: B rows, T new positions, S capacity, C d_model, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mtp_lightning import parts
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.block import eager_blocks
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.runtime import eval_mode

if TYPE_CHECKING:
    from mtp_lightning.weights import WeightPacker


TrunkPass = Callable[[KVCache, Tensor, Tensor | None], Tensor]
"""A pass of the trunk, from token ids to logits: its cache, with an open pass; the token buffer
[B, S]; and where to write the stack's branch states [B, S, C], None without drafts -> the logits
[B, T, V]."""

DraftPass = Callable[[KVCache, Tensor, Tensor, Tensor | None, Sequence[int]], tuple[Tensor, Tensor]]
"""A pass of one depth, from token ids to logits: its cache, with an open pass; the token buffer
[B, S]; the states [B, S, C] that the depth reads; where to write its own states [B, S, C], None for
the deepest; and each row's index of the token to draft from -> that token's state [B, 1, C] and
logits [B, V]."""


class FusedPasses(Protocol):
    """The passes that a part provides for one model while it decodes."""

    trunk: TrunkPass | None  # None if the part has no code for this trunk, head or stack

    def draft(self, k: int, weight_VC: Tensor) -> DraftPass | None:
        """The pass of depth ``k``, drafting with the head's weight ``weight_VC``; None if the part
        has no code for that stack."""

    def first_rows(self, weight_NK: Tensor, rows: int) -> Tensor:
        """The first rows of a weight, as a weight that is prepared for skinny GEMMs."""

    def close(self) -> None:
        """Restore the model's own weights and layouts."""


@dataclass(frozen=True)
class DecodingCode:
    """A part's decoding code for one type of device."""

    passes: Callable[[MTPModel], FusedPasses]  # prepares a model until ``FusedPasses.close``
    # What the device lacks to read rounded weights fast; None for nothing.
    rounded_weights_need: Callable[[], str | None]
    # Packs the weights of a model that only decodes.
    packer_for: Callable[[MTPModel, Path | None, str], WeightPacker | None]
    # Makes products with weights in blocks sums of integers.
    multiply_integers: Callable[[MTPModel], str | None]
    version: str  # identifies the code, whose speed may change with it


_CODE: dict[str, DecodingCode] = {}
_LOCK = threading.Lock()
# For every model that decodes: the number of callers inside `fused_passes`, and its passes.
_OPEN: WeakKeyDictionary[nn.Module, tuple[int, FusedPasses]] = WeakKeyDictionary()


def register(device: str, code: DecodingCode) -> None:
    """Use ``code`` for the models that decode on devices of the type ``device``."""
    _CODE[device] = code


def _code(device: str) -> DecodingCode | None:
    parts.load_cpu()
    return _CODE.get(device)


def version(device: str) -> str:
    """The version of the code for a type of device; empty if there is none."""
    code = _code(device)
    return "" if code is None else code.version


def rounded_weights_need() -> str | None:
    """What a CPU lacks to read rounded weights (``precision.py``) faster than fp32; None if nothing
    is missing."""
    code = _code("cpu")
    return "the part mtp_lightning.cpu" if code is None else code.rounded_weights_need()


def multiply_integers(model: MTPModel) -> str | None:
    """Let products with weights in blocks of few bits be sums of integers while the model decodes:
    the other factor is rounded to 8 bits for every block. Returns what is missing; None if nothing
    is."""
    device = model.head.weight.device.type
    if (code := _code(device)) is None:
        return "the part mtp_lightning.cpu" if device == "cpu" else "a model on a CPU"
    return code.multiply_integers(model)


def packer_for(
    model: MTPModel, path: Path | None = None, rounding: str = ""
) -> WeightPacker | None:
    """The packer of a model's weights; None if no part has code for it.

    Args:
        model: with the numbers that are to be kept, or without numbers yet.
        path: the file or folder that its weights are read from, for :meth:`WeightPacker.restore`;
            None for a model with other numbers.
        rounding: how its numbers are rounded before they are packed, in words.
    """
    code = _code(model.head.weight.device.type)
    return None if code is None else code.packer_for(model, path, rounding)


@contextmanager
def fused_passes(model: MTPModel) -> Iterator[None]:
    """Prepare a model for decoding. Concurrent callers share the preparation; the last one to leave
    drops it, so that it never outlives a change of the weights."""
    code = _code(model.head.weight.device.type)
    if code is None:
        yield
        return
    with _LOCK:
        holders, passes = _OPEN.get(model) or (0, code.passes(model))
        _OPEN[model] = holders + 1, passes
    try:
        yield
    finally:
        with _LOCK:
            holders, passes = _OPEN[model]
            if holders > 1:
                _OPEN[model] = holders - 1, passes  # never missing: fused() reads without the lock
            else:
                del _OPEN[model]
                passes.close()


@contextmanager
def decoding_passes(model: MTPModel) -> Iterator[None]:
    """Prepare a model for the passes of a session: evaluation mode, no autograd, fused decode steps
    where available, blocks that run eagerly."""
    with eval_mode(model), torch.inference_mode(), fused_passes(model), eager_blocks(model):
        yield


def fused(model: MTPModel) -> FusedPasses | None:
    """The passes of a model that is inside :func:`fused_passes`; None for any other model."""
    entry = _OPEN.get(model)
    return None if entry is None else entry[1]

"""Fused passes of decoding: a whole narrow pass in one call, where a part has code for it.

A part registers a maker for a device type. Those who decode with a model hold it open by
:func:`fused_passes`; a session then asks once, by :func:`fused`, and whatever it is not given runs
through the model's modules.

Shapes: B rows, T new positions, S capacity, C d_model, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from mtp_lightning import parts
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.kv_cache import KVCache


class TrunkPass(Protocol):
    """The trunk from token ids to logits."""

    def __call__(self, cache: KVCache, ids_BS: Tensor, states_BSC: Tensor | None) -> Tensor:
        """The logits [B, T, V].

        Args:
            cache: the trunk's, opened for a pass.
            ids_BS: all token ids; like the next, of the cache's capacity.
            states_BSC: takes the states that the stack branches from; None without a stack.
        """


class DraftPass(Protocol):
    """One depth of the stack from token ids to logits."""

    def __call__(
        self,
        cache: KVCache,
        ids_BS: Tensor,
        before_BSC: Tensor,
        after_BSC: Tensor | None,
        newest: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """The state [B, 1, C] of one token a row, and its logits [B, V].

        Args:
            cache: the depth's, opened for a pass.
            ids_BS: all token ids; like the next two, of the cache's capacity.
            before_BSC: the states that the depth reads.
            after_BSC: takes the depth's own states; None for the deepest.
            newest: for every row the index of that token in the pass.
        """


class FusedPasses(Protocol):
    """What a part does for one model while it decodes.

    Attributes:
        trunk: None where there is no code for this trunk, head or stack.
    """

    trunk: TrunkPass | None

    def draft(self, k: int, weight_VC: Tensor) -> DraftPass | None:
        """Depth ``k``, drafting with the head's weight ``weight_VC``; None where there is no code
        for that stack."""

    def pack(self, weight_NK: Tensor) -> None:
        """Lay out one more weight for products with few rows; it is the caller's own tensor."""

    def close(self) -> None:
        """Leave the model as it was."""


_MAKERS: dict[str, Callable[[MTPModel], FusedPasses]] = {}
_NEEDS: dict[str, Callable[[], str | None]] = {}
_LOCK = threading.Lock()
# For every model that decodes: by how many it is held open, and its passes.
_OPEN: WeakKeyDictionary[nn.Module, tuple[int, FusedPasses]] = WeakKeyDictionary()


def register(
    device: str,
    make: Callable[[MTPModel], FusedPasses],
    rounded_weights_need: Callable[[], str | None],
) -> None:
    """Let ``make`` prepare the models that decode on devices of the type ``device``.

    Args:
        device: its type.
        make: of a model, its fused passes.
        rounded_weights_need: see the function of that name.
    """
    _MAKERS[device], _NEEDS[device] = make, rounded_weights_need


def rounded_weights_need(device: str) -> str | None:
    """What is missing for weights of fewer bytes (``precision.py``) to be read faster than fp32 on
    a type of device; None where nothing is."""
    parts.load()
    need = _NEEDS.get(device)
    return "the part mtp_lightning.cpu" if need is None else need()


@contextmanager
def fused_passes(model: MTPModel) -> Iterator[None]:
    """Prepare a model for decoding. Several at a time share the preparation, which the last one
    drops, so that it never outlives a change of the weights."""
    parts.load()
    make = _MAKERS.get(model.head.weight.device.type)
    if make is None:
        yield
        return
    with _LOCK:
        holders, passes = _OPEN.get(model) or (0, make(model))
        _OPEN[model] = holders + 1, passes
    try:
        yield
    finally:
        with _LOCK:
            holders, passes = _OPEN.pop(model)
            if holders > 1:
                _OPEN[model] = holders - 1, passes
            else:
                passes.close()


def fused(model: MTPModel) -> FusedPasses | None:
    """The fused passes of a model that is held open by :func:`fused_passes`; else None."""
    held = _OPEN.get(model)
    return None if held is None else held[1]

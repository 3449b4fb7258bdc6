"""Packed copies of weights for skinny GEMMs: products with the few rows of a pass of decoding.

Such a product is limited by reading the weights from memory; three rows cost as much as one. With
the layout of ``cpp/formats.h`` the bits of a row's result do not depend on the other rows, which
speculative decoding requires. A weight is packed in the smallest of these formats that holds its
numbers exactly:

- blocks of 32 inputs with 4 or 8 bits, as in GGUF's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, and in Q4_K,
  Q5_K and Q6_K, whose file holds the steps and offsets (``WeightScales``); products have the bits
  of fp32, or after :func:`use_integers` are sums of integers (``cpp/integer.h``);
- int8, a quarter of fp32's bytes, for integers times one scale per output; the product is scaled at
  its end;
- bf16 or fp16, half of the bytes; products are computed in fp32;
- fp32.

``decoding/precision.py`` rounds a model to a format. Without the C++, the layout is oneDNN's, which
takes about half of an unpacked product's time.

A weight holds its packed copy as an attribute from :func:`pack` to :func:`unpack`. After
:func:`replace_by_packed` the copy is its only storage, which :func:`unpacked_weight` unpacks, to
the last bit.

Shapes: K inputs, N outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from mtp_lightning.cpu import library as native
from mtp_lightning.nn.weight_scales import WeightScales


class Kind(IntEnum):
    """``Kind`` of formats.h: the format of a packed weight."""

    FULL = 0
    BF16 = 1
    BYTE = 2
    BLOCKS4 = 3
    BLOCKS8 = 4
    BLOCKS4_FULL = 5
    BLOCKS8_FULL = 6
    FP16 = 7

    @property
    def in_blocks(self) -> bool:
        return Kind.BLOCKS4 <= self <= Kind.BLOCKS8_FULL


# Added to the kind where products are of integers.
_INTEGER = 256
# Outputs of whole panels for any instructions; with AVX2 a panel has 16.
PANEL = 64
# Formats that packing detects from the weight itself, the smallest first.
_SMALL, _LARGE = (Kind.BLOCKS4, Kind.BYTE, Kind.BLOCKS8), (Kind.BF16, Kind.FP16, Kind.FULL)


class PackedStruct(ctypes.Structure):
    """``Packed`` of formats.h."""

    _fields_ = (("data", c_void_p), ("kind", c_int64))


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight [outputs, inputs] of a kind; ``data`` has the bytes of its panels, uint8, and
    ``integers`` is whether products are sums of integers, only in blocks."""

    data: Tensor
    outputs: int
    inputs: int
    kind: Kind
    integers: bool = False

    @property
    def struct(self) -> PackedStruct:
        """``Packed``; it points to the data and does not keep it alive."""
        return PackedStruct(self.data.data_ptr(), self._code)

    @property
    def _code(self) -> int:
        return self.kind | (_INTEGER if self.integers else 0)

    def first(self, outputs: int) -> PackedWeight:
        """The weight of the first outputs, whole panels of them, in the same memory."""
        assert outputs % PANEL == 0 and outputs <= self.outputs
        size = native.lib().packed_size(outputs, self.inputs, self.kind)
        return replace(self, data=self.data[:size], outputs=outputs)

    def unpacked(self) -> Tensor:
        """The weight, [N, K]."""
        weight = torch.empty(self.outputs, self.inputs)
        native.call("unpack_weight", self.data, weight, self.outputs, self.inputs, self.kind)
        return weight

    def rows(self, ids: Tensor) -> Tensor:
        """The rows [..., K] of indices [...]."""
        if ids.numel() and not 0 <= ids.min() <= ids.max() < self.outputs:
            raise IndexError(f"an index is outside of 0 .. {self.outputs - 1}")
        ids = ids.long().contiguous()
        rows = torch.empty(*ids.shape, self.inputs)
        sizes = ids.numel(), self.outputs, self.inputs
        native.call("unpack_rows", self.data, ids, rows, *sizes, self.kind)
        return rows

    def linear(self, x: Tensor) -> Tensor:
        """``x @ weight.T`` [..., N] of ``x`` [..., K]; a row's bits depend on no other row."""
        assert x.shape[-1] == self.inputs
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.outputs)
        rows = x.numel() // self.inputs
        pointers = x.data_ptr(), self.data.data_ptr(), out.data_ptr()
        native.lib().decode_linear(*pointers, rows, self.outputs, self.inputs, self._code)
        return out


Packed = PackedWeight | Tensor


def packed_copy(weight: Tensor) -> Packed | None:
    """The packed copy of a weight, if it has one."""
    return vars(weight).get("packed")


def packed_of(weight: Tensor) -> PackedWeight | None:
    """A weight's packed copy in the layout of formats.h, if it has one."""
    packed = packed_copy(weight)
    return packed if isinstance(packed, PackedWeight) else None


def pack(weight_NK: Tensor) -> None:
    """Give an fp32 or bf16 weight a packed copy, if there is a kernel that reads one."""
    fits = weight_NK.is_cpu and weight_NK.dtype in (torch.float32, torch.bfloat16)
    if not fits or only_copy(weight_NK) is not None:
        return
    weight = weight_NK.detach().float()
    packed: Packed | None = packed_weight(weight)
    if packed is None and native.ONEDNN:
        # 4 is a hint of the number of rows; with 1, the layout would depend on their number.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 4)
    if packed is not None:
        _hold(weight_NK, packed)


def _hold(weight: Tensor, packed: Packed) -> None:
    """Give a weight a packed copy, with the products that it was marked for."""
    if isinstance(packed, PackedWeight) and packed.kind.in_blocks:
        packed = replace(packed, integers=vars(weight).get("integers", False))
    vars(weight)["packed"] = packed


def use_integers(weights: Iterable[Tensor]) -> bool:
    """Let the packed copies of weights, present and later ones, multiply integers where they are in
    blocks; returns whether one is, and changes nothing if none is."""
    weights = list(weights)
    copies = (packed_of(weight) or packed_weight(weight) for weight in weights)
    if not any(packed is not None and packed.kind.in_blocks for packed in copies):
        return False
    for weight in weights:
        vars(weight)["integers"] = True
        if (packed := packed_copy(weight)) is not None:
            _hold(weight, packed)
    return True


def unpack(weight: Tensor) -> None:
    """Drop a weight's packed copy, unless it is the weight's only storage."""
    if only_copy(weight) is None:
        vars(weight).pop("packed", None)


def replace_by_packed(weight_NK: Tensor, scales: WeightScales | None = None) -> None:
    """Replace an fp32 weight's own numbers by its packed copy, if it can have one; ``scales`` are
    those of its blocks, if its file holds them."""
    if only_copy(weight_NK) is None and (packed := packed_weight(weight_NK, scales)) is not None:
        replace_by(weight_NK, packed)


def replace_by(weight_NK: Tensor, packed: PackedWeight) -> None:
    """Replace a weight's own numbers by a packed copy of them."""
    _hold(weight_NK, packed)
    weight_NK.data.untyped_storage().resize_(0)


def only_copy(weight: Tensor) -> PackedWeight | None:
    """A weight's packed copy, if that is its only storage."""
    return packed_of(weight) if weight.untyped_storage().nbytes() == 0 else None


def unpacked_weight(weight: Tensor) -> Tensor:
    """A weight with its numbers: itself, or an unpacked copy if it is only packed."""
    packed = only_copy(weight)
    return weight if packed is None else packed.unpacked()


def first_rows(weight_NK: Tensor, rows: int) -> Tensor:
    """The first rows of a packed weight, as a weight with a packed copy."""
    packed = packed_of(weight_NK)
    if packed is None or rows % PANEL:
        first = unpacked_weight(weight_NK).detach()[:rows]
        vars(first)["integers"] = vars(weight_NK).get("integers", False)
        pack(first)
    else:
        first = weight_NK.new_empty(rows, packed.inputs)
        first.untyped_storage().resize_(0)
        vars(first)["packed"] = packed.first(rows)
    return first


def packed_weight(weight_NK: Tensor, scales: WeightScales | None = None) -> PackedWeight | None:
    """A copy in the layout of formats.h, or None if the library does not support the weight; scales
    as of :func:`replace_by_packed`."""
    weight_NK = weight_NK.detach()
    if not native.fits(weight_NK) or not weight_NK.is_contiguous() or not weight_NK.numel():
        return None
    outputs, inputs = weight_NK.shape
    lib, address = native.lib(), weight_NK.data_ptr()

    def attempt(kind: Kind, pack: str, *blocks: Tensor) -> PackedWeight | None:
        """The packed weight; None if a number does not fit."""
        data = torch.empty(lib.packed_size(outputs, inputs, kind), dtype=torch.uint8)
        fits = native.call(pack, weight_NK, *blocks, data, outputs, inputs, kind)
        return PackedWeight(data, outputs, inputs, kind) if fits else None

    def detect(kinds: Iterable[Kind]) -> PackedWeight | None:
        # Without memory for the result, the library tries the first numbers alone.
        likely = (k for k in kinds if lib.pack_weight(address, None, outputs, inputs, k))
        return next(filter(None, (attempt(kind, "pack_weight") for kind in likely)), None)

    if packed := detect(_SMALL):
        return packed
    if scales is not None:
        kind = Kind.BLOCKS4_FULL if (scales.bits, scales.group) == (4, 32) else Kind.BLOCKS8_FULL
        scales = scales if kind == Kind.BLOCKS4_FULL else scales.regrouped(16)
        steps, offsets = scales.steps.contiguous(), scales.offsets.contiguous()
        assert steps.shape == offsets.shape == (outputs, inputs // scales.group)
        if packed := attempt(kind, "pack_scaled", steps, offsets):
            return packed
    return detect(_LARGE)

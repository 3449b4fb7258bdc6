"""Packed copies of weights for skinny GEMMs: products with the few rows of a pass of decoding.

Such a product is limited by reading the weights from memory; three rows cost as much as one. With
the layout of ``cpp/skinny.h`` the bits of a row's result do not depend on the other rows, which
speculative decoding requires. Weights whose numbers are all bf16 are packed in bf16: half of the
bytes without loss, since the product is computed in fp32. Weights that are integers of int8 times
one scale per output are packed in int8, a quarter of the bytes; the product is scaled at its end.
``decoding/precision.py`` rounds a model to either. Without the C++, the layout is oneDNN's, which
takes about half of an unpacked product's time.

A weight holds its packed copy as an attribute from :func:`pack` to :func:`unpack`.

Shapes: K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_lightning.cpu import library as native

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight.

    Attributes:
        numbers: fp32, bf16 or int8, in panels; for int8, preceded by the bytes of the scales.
        outputs: N.
        inputs: K.
    """

    numbers: Tensor
    outputs: int
    inputs: int

    @property
    def kind(self) -> int:
        """``Kind`` of skinny.h: the dtype of the numbers."""
        return _KINDS[self.numbers.dtype]

    def linear(self, x: Tensor) -> Tensor:
        """``x @ weight.T`` [..., N] of ``x`` [..., K]; a row's bits depend on no other row."""
        assert x.shape[-1] == self.inputs
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.outputs)
        rows = x.numel() // self.inputs
        pointers = x.data_ptr(), self.numbers.data_ptr(), out.data_ptr()
        native.lib().decode_linear(*pointers, rows, self.outputs, self.inputs, self.kind)
        return out


Packed = PackedWeight | Tensor


def packed_copy(weight: Tensor) -> Packed | None:
    """The packed copy of a weight, if it has one."""
    return vars(weight).get("packed")


def pack(weight_NK: Tensor) -> None:
    """Give an fp32 or bf16 weight a packed copy, if there is a kernel that reads one."""
    if not weight_NK.is_cpu or weight_NK.dtype not in (torch.float32, torch.bfloat16):
        return
    weight = weight_NK.detach().float()
    found: Packed | None = packed_weight(weight)
    if found is None and native.ONEDNN:
        # 4 is a hint of the number of rows; with 1, the layout would depend on their number.
        found = torch.ops.mkldnn._reorder_linear_weight(weight, 4)
    if found is not None:
        vars(weight_NK)["packed"] = found


def unpack(weight: Tensor) -> None:
    """Drop a weight's packed copy."""
    vars(weight).pop("packed", None)


def packed_weight(weight_NK: Tensor) -> PackedWeight | None:
    """A copy in the layout of skinny.h, or None if the library does not support the weight."""
    weight_NK = weight_NK.detach()
    if not native.fits(weight_NK) or not weight_NK.is_contiguous() or not weight_NK.numel():
        return None
    library, shape = native.lib(), tuple(weight_NK.shape)
    # Try the fewest bytes first; an attempt ends at the first number that does not fit.
    for dtype, fill in (
        (torch.int8, library.pack_byte),
        (torch.bfloat16, library.pack_half),
        (torch.float32, library.pack_full),
    ):
        numbers = torch.empty(library.packed_size(*shape, _KINDS[dtype]), dtype=dtype)
        if fill(weight_NK.data_ptr(), numbers.data_ptr(), *shape):
            break
    return PackedWeight(numbers, *shape)

"""Products with the few rows of a pass of decoding, by weights packed for them (``cpp/few.h``).

Such a product is a read of the weights, and is done at the memory's rate. Weights whose numbers are
all bf16's are packed in bf16, which is half of the bytes and loses nothing: the product is taken in
fp32, and is the same to the last bit. Weights that are whole numbers of a byte times one scale an
output are packed in int8, a quarter of the bytes; their product is scaled at its end.
:func:`round_weights` makes a model such a one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mtp_lightning.nn.kernels import native

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


@dataclass(frozen=True)
class FewRows:
    """A packed weight.

    Attributes:
        numbers: fp32, bf16 or int8, in panels; of int8 the scales' bytes come first.
        outputs: N.
        inputs: K.
    """

    numbers: Tensor
    outputs: int
    inputs: int

    @property
    def kind(self) -> int:
        """``Kind`` of few.h: what the numbers are."""
        return _KINDS[self.numbers.dtype]

    def linear(self, x: Tensor) -> Tensor:
        """``x @ weight.T`` of ``x`` [..., K]; a row's result depends on no other row."""
        assert x.shape[-1] == self.inputs
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.outputs)
        rows = x.numel() // self.inputs
        pointers = x.data_ptr(), self.numbers.data_ptr(), out.data_ptr()
        native.lib().narrow_linear(*pointers, rows, self.outputs, self.inputs, self.kind)
        return out


def pack(weight_NK: Tensor) -> FewRows | None:
    """A packed copy of a weight, or None where there is no kernel for it."""
    weight_NK = weight_NK.detach()
    if not native.fits(weight_NK) or not weight_NK.is_contiguous() or not weight_NK.numel():
        return None
    library, shape = native.lib(), tuple(weight_NK.shape)
    # From the fewest bytes on: the first number that does not fit says so.
    for dtype, fill in (
        (torch.int8, library.pack_byte),
        (torch.bfloat16, library.pack_half),
        (torch.float32, library.pack_full),
    ):
        numbers = torch.empty(library.packed_size(*shape, _KINDS[dtype]), dtype=dtype)
        if fill(weight_NK.data_ptr(), numbers.data_ptr(), *shape):
            break
    return FewRows(numbers, *shape)


@torch.no_grad()
def round_weights(model: nn.Module, precision: Literal["bf16", "int8"]) -> None:
    """Round every matrix of a model, in place and in its own dtype; gains, biases and other vectors
    stay as they are.

    In int8 a row becomes the nearest multiples, up to 127, of a step that its largest number is 127
    of. The step has 16 binary digits, so that the multiples are numbers of fp32. A row with a
    number that is not finite becomes NaN.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(
                parameter.bfloat16() if precision == "bf16" else _rounded_to_bytes(parameter)
            )


def _rounded_to_bytes(weight: Tensor) -> Tensor:
    weight = weight.float()
    mantissa, exponent = torch.frexp(weight.abs().amax(-1, keepdim=True) / 127)
    # Up, so that no number is above 127.
    step = torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)
    return torch.where(step == 0, 0.0, (weight / step).round() * step)

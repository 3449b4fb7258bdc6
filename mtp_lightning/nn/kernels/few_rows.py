"""Products with the few rows of a pass of decoding, by weights packed for them (``cpp/few.h``).

Such a product is a read of the weights, and is done at the memory's rate. Weights whose numbers are
all bf16's are packed in bf16, which is half of the bytes and loses nothing: the product is taken in
fp32, and is the same to the last bit. :func:`round_weights` makes a model such a one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtp_lightning.nn.kernels import native


@dataclass(frozen=True)
class FewRows:
    """A packed weight.

    Attributes:
        numbers: fp32 or bf16, in panels.
        outputs: N.
        inputs: K.
    """

    numbers: Tensor
    outputs: int
    inputs: int

    @property
    def half(self) -> bool:
        """Whether the numbers are bf16."""
        return self.numbers.dtype == torch.bfloat16

    def linear(self, x: Tensor) -> Tensor:
        """``x @ weight.T`` of ``x`` [..., K]; a row's result depends on no other row."""
        assert x.shape[-1] == self.inputs
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.outputs)
        rows = x.numel() // self.inputs
        pointers = x.data_ptr(), self.numbers.data_ptr(), out.data_ptr()
        native.lib().narrow_linear(*pointers, rows, self.outputs, self.inputs, self.half)
        return out


def pack(weight_NK: Tensor) -> FewRows | None:
    """A packed copy of a weight, or None where there is no kernel for it."""
    weight_NK = weight_NK.detach()
    if not native.fits(weight_NK) or not weight_NK.is_contiguous() or not weight_NK.numel():
        return None
    library, shape = native.lib(), tuple(weight_NK.shape)
    numbers = torch.empty(library.packed_size(*shape, True), dtype=torch.bfloat16)
    # The first number that is none of bf16's says so.
    if not library.pack_half(weight_NK.data_ptr(), numbers.data_ptr(), *shape):
        numbers = torch.empty(library.packed_size(*shape, False))
        library.pack_full(weight_NK.data_ptr(), numbers.data_ptr(), *shape)
    return FewRows(numbers, *shape)


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Round every matrix of a model to bf16, in place and in its own dtype; gains, biases and other
    vectors stay as they are."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.bfloat16())

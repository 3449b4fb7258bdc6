"""Matrix products with the fastest kernel that a CPU has.

PyTorch sends fp32 matrix products on a CPU to MKL, which uses only AVX2 on AMD processors. oneDNN,
inside the same PyTorch, has AVX-512 code for every vendor: on an EPYC with AVX-512 it is about
twice as fast (``python -m benchmarks.kernels``). Both compute in fp32; with
``trainer.precision=bf16-mixed`` the products are in bf16
(``python -m benchmarks.train_step precision``).

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtp_lightning.cpu.library import ONEDNN
from mtp_lightning.cpu.packed import packed_copy, unpacked_weight
from mtp_lightning.nn import ops
from mtp_lightning.nn.batch_invariant import MAX_VERIFY_WIDTH, is_batch_invariant

# With fewer rows (decoding a few tokens) a product only reads the weights, and setting up a oneDNN
# primitive costs more than it saves.
_MIN_ROWS = 32


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes this product: fp32, AVX-512, many rows."""
    return ONEDNN and x.dtype == weight.dtype == torch.float32 and x.shape[0] >= _MIN_ROWS


def matmul_transposed(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """``ops.matmul_transposed``."""
    if uses_onednn(a_MK, b_NK):
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
    return a_MK @ b_NK.t()


def weight_gradient(grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    """``ops.weight_gradient``."""
    n, k = grad_MN.shape[1], x_MK.shape[1]
    # oneDNN is up to three times faster with the narrower matrix on the left.
    if n > k:
        return matmul_transposed(x_MK.t(), grad_MN.t()).t()
    return matmul_transposed(grad_MN.t(), x_MK.t())


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        return matmul_transposed(x_MK, weight_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad_MN,) = grads
        x_MK, weight_NK = ctx.saved_tensors
        d_x = matmul_transposed(grad_MN, weight_NK.t()) if ctx.needs_input_grad[0] else None
        d_weight = weight_gradient(grad_MN, x_MK) if ctx.needs_input_grad[1] else None
        return d_x, d_weight


def _in_half(x: Tensor) -> bool:
    """Whether autocast to bf16 is on, for fp32 rows on a CPU."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and x.dtype == torch.float32
    )


class _HalfLinear(torch.autograd.Function):
    """bf16 products of fp32 rows with fp32 results. Autocast would give bf16 results to attention,
    gates and norms, whose CPU code is for fp32 and would not be faster in bf16."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        x_MK = x_MK.bfloat16()
        ctx.save_for_backward(x_MK, weight_NK)
        return (x_MK @ weight_NK.bfloat16().t()).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_MK, weight_NK = ctx.saved_tensors
        grad_MN = grads[0].bfloat16()
        d_x = (grad_MN @ weight_NK.bfloat16()).float() if ctx.needs_input_grad[0] else None
        d_weight = (grad_MN.t() @ x_MK).float() if ctx.needs_input_grad[1] else None
        return d_x, d_weight


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """``ops.linear``. Uses a weight's packed copy if it has one (without autograd); a copy in the
    library's layout only for few tokens per row of the batch, and in batch-invariant passes."""
    if (packed := packed_copy(weight_NK)) is not None:
        if x.dtype != torch.float32:  # a bf16 model; packed copies multiply fp32
            return linear(x.float(), weight_NK).to(x.dtype)
        if isinstance(packed, Tensor):
            return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        few = x.dim() < 2 or x.shape[-2] <= MAX_VERIFY_WIDTH
        if packed.integers or few or is_batch_invariant():
            return packed.linear(x)
        weight_NK = unpacked_weight(weight_NK)
    x_MK = x.reshape(-1, x.shape[-1])
    if _in_half(x):
        return _HalfLinear.apply(x_MK, weight_NK).view(*x.shape[:-1], -1)
    if uses_onednn(x_MK, weight_NK):
        return _OneDNNLinear.apply(x_MK, weight_NK).view(*x.shape[:-1], -1)
    return ops.linear.plain(x, weight_NK)


ops.linear.register("cpu", linear)
ops.matmul_transposed.register("cpu", matmul_transposed)
ops.weight_gradient.register("cpu", weight_gradient)

"""Matrix products by the fastest kernel that a CPU has.

PyTorch sends fp32 matrix products on a CPU to MKL, which on AMD processors stays with AVX2 code.
oneDNN, inside the same PyTorch, has AVX-512 code for every vendor: on an EPYC with AVX-512 it is
about twice as fast (``python -m benchmarks.kernels``). Arithmetic is full fp32 either way, but for
``trainer.precision=bf16-mixed``, whose products are bf16's
(``python -m benchmarks.train_step precision``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.nn.kernels import few_rows
from mtp_lightning.nn.kernels.eager import eager_cpu
from mtp_lightning.nn.kernels.exact import FEW, is_exact
from mtp_lightning.nn.kernels.few_rows import FewRows

Packed = FewRows | Tensor

# Below this many rows (decoding a few tokens) a product is a read of the weights, and the set-up
# of a oneDNN primitive costs more than it saves.
_MIN_ROWS = 32


def _onednn_available() -> bool:
    # A rule of the machine alone, never of a timing: two processes of one run must agree.
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


_ONEDNN = _onednn_available()


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these two goes to oneDNN: fp32, on an AVX-512 CPU, many rows."""
    return (
        _ONEDNN
        and eager_cpu(x)
        and x.dtype == torch.float32
        and weight.dtype == torch.float32
        and x.shape[0] >= _MIN_ROWS
    )


def matmul_transposed(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """``a @ b.T`` by the fastest kernel, without autograd; strides are free. Returns [M, N]."""
    if uses_onednn(a_MK, b_NK):
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
    return a_MK @ b_NK.t()


def weight_gradient(grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    """``grad.T @ x`` [N, K], the gradient of a linear layer's weight."""
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
    """bf16 products of fp32 rows, whose sums are fp32 again. Autocast would carry bf16 on to
    attention, gates and norms, which are made for fp32 on a CPU and gain nothing from it there."""

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


def linear(x: Tensor, weight_NK: Tensor, packed: Packed | None = None) -> Tensor:
    """``x @ weight.T`` for ``x`` of [..., K]: :func:`torch.nn.functional.linear`, made fast.

    Args:
        x: rows.
        weight_NK: the weight.
        packed: its copy from :func:`pack`, which is taken instead, without autograd. Where it is
            this project's own, only for few tokens of every row of a batch, and in exact passes.
    """
    if packed is not None and not torch.compiler.is_compiling():
        if x.dtype != torch.float32:  # of a model in bf16, whose packed copy is for fp32
            return linear(x.float(), weight_NK, packed).to(x.dtype)
        if isinstance(packed, Tensor):
            return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        if is_exact() or x.dim() < 2 or x.shape[-2] <= FEW:
            return packed.linear(x)
    if weight_NK.dtype == torch.bfloat16 != x.dtype and not torch.is_autocast_enabled(
        x.device.type
    ):
        weight_NK = weight_NK.to(x.dtype)  # held so for memory alone (nn/half.py)
    if eager_cpu(x):
        x_MK = x.reshape(-1, x.shape[-1])
        if _in_half(x):
            return _HalfLinear.apply(x_MK, weight_NK).view(*x.shape[:-1], -1)
        if uses_onednn(x_MK, weight_NK):
            return _OneDNNLinear.apply(x_MK, weight_NK).view(*x.shape[:-1], -1)
    return F.linear(x, weight_NK)


def pack(weight_NK: Tensor) -> Packed | None:
    """A copy of a weight in the layout of the fastest kernel for the few rows of decoding, or None
    where there is none.

    Three rows then cost what one does, and a row's result does not depend, to the last bit, on how
    many others are computed with it. Speculative decoding rests on both. Without the layers' own
    code it is oneDNN's blocked layout, in about half of an unpacked product's time.
    """
    if weight_NK.dtype == torch.bfloat16:
        weight_NK = weight_NK.float()
    own = few_rows.pack(weight_NK)
    if own is not None:
        return own
    if not _ONEDNN or weight_NK.device.type != "cpu" or weight_NK.dtype != torch.float32:
        return None
    # 4 is a hint of how many rows to expect; with 1 the layout depends on the number of rows.
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), 4)


_PACKING = threading.Lock()
_INSIDE: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many decode with a model


class Packs(Protocol):
    """A layer that has a form of its own for decoding."""

    packed: Any

    def pack(self) -> Any:
        """What ``packed`` is while decoding; None leaves the layer as it is."""


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, every layer of ``model`` with an attribute ``packed`` has there what its ``pack()``
    makes: a linear layer a packed copy of its weight, a block or trunk what it takes to be computed
    in one call.

    The copies are made by the first to come in and dropped by the last to go, so they can never
    outlive a change of the weights. Those who decode with one model at a time share them.
    """
    layers: list[Packs] = [layer for layer in model.modules() if hasattr(layer, "packed")]  # type: ignore[misc]
    with _PACKING:
        if not _INSIDE.get(model):
            # What a layer is made of comes before it.
            for layer in reversed(layers):
                layer.packed = layer.pack()
        _INSIDE[model] = _INSIDE.get(model, 0) + 1
    try:
        yield
    finally:
        with _PACKING:
            _INSIDE[model] -= 1
            if not _INSIDE[model]:
                for layer in layers:
                    layer.packed = None

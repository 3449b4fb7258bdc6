"""SwiGLU layers in C++ (``cpp/experts.cpp``): routed experts or a dense layer, one call per pass.

The C++ is as fast for narrow layers as for wide ones, which oneDNN is not, and reads an expert's
tokens without gathering them. The few tokens of a pass of decoding are multiplied one by one.

Shapes: M tokens, K chosen experts of a token, R = M * K rows, E experts, C d_model, F d_expert.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.cpu import library as native
from mtp_lightning.nn.batch_invariant import MAX_VERIFY_WIDTH, is_batch_invariant
from mtp_lightning.nn.experts import routed_experts

# With fewer tokens, packing the weights costs more than it saves.
_MIN_TOKENS = 32
# Without a gradient, packing pays for experts of up to so many weights a matrix, or with so many
# rows per expert (measured with experts of 6 thousand to 260 thousand weights on an Intel Xeon).
_SMALL_EXPERT = 2**15
_MIN_ROWS_OF_EXPERT = 64


def fits(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the C++ supports these tensors, those of ``ops.swiglu`` or of ``routed_experts``:
    fp32, widths of multiples of 16, many rows."""
    return (
        native.fits(x, gate_up, down)
        and down.shape[-2] % 16 == down.shape[-1] % 16 == 0
        and gate_up.is_contiguous()
        and down.is_contiguous()
        and x.numel() >= _MIN_TOKENS * x.shape[-1]
        and not is_batch_invariant()
        and not torch.is_autocast_enabled("cpu")
    )


def mix_experts(
    x_MC: Tensor, chosen_MK: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """``nn.experts.routed_experts``."""
    inputs = x_MC, chosen_MK, gates_MK, gate_up, down
    learns = torch.is_grad_enabled()
    if not learns and (x_MC.shape[0] <= MAX_VERIFY_WIDTH or is_batch_invariant()):
        return _one_by_one(*inputs)
    small = down[0].numel() <= _SMALL_EXPERT
    many = chosen_MK.numel() >= _MIN_ROWS_OF_EXPERT * len(down)
    if (learns or small or many) and fits(x_MC, gate_up, down):
        return _NativeExperts.apply(x_MC, gates_MK, gate_up, down, chosen_MK)
    return routed_experts.plain(*inputs)


def _one_by_one(
    x_MC: Tensor, chosen_MK: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Every token and expert alone: each product only reads the weights, and the bits of a token's
    result do not depend on other tokens."""
    out = torch.zeros_like(x_MC)
    for x_C, row_C, experts, gates_K in zip(
        x_MC, out, chosen_MK.tolist(), gates_MK.unbind(0), strict=True
    ):
        for expert, gate in zip(experts, gates_K.unbind(0), strict=True):
            projected, up = torch.mv(gate_up[expert], x_C).chunk(2)
            row_C.addcmul_(torch.mv(down[expert], F.silu(projected).mul_(up)), gate)
    return out


def feed_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``ops.swiglu`` as a single expert of all tokens: [..., C]."""
    x_MC = x.reshape(-1, x.shape[-1])
    chosen_M1 = torch.zeros(x_MC.shape[0], 1, dtype=torch.int64)
    gates_M1 = x_MC.new_ones(x_MC.shape[0], 1)
    weights = gate_up.unsqueeze(0), down.unsqueeze(0)
    return _NativeExperts.apply(x_MC, gates_M1, *weights, chosen_M1).view(x.shape)


class _NativeExperts(torch.autograd.Function):
    """Saves its input and the values before the gate; the backward pass recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, x_MC: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor, chosen_MK: Tensor
    ) -> Tensor:
        x_MC, gates_MK, chosen_MK = (x.contiguous() for x in (x_MC, gates_MK, chosen_MK))
        n_experts, rows = down.shape[0], chosen_MK.numel()
        starts_E1, order_R = chosen_MK.new_empty(n_experts + 1), chosen_MK.new_empty(rows)
        native.call("experts_sort", chosen_MK, starts_E1, order_R, rows, n_experts)
        inputs = (x_MC, gates_MK, gate_up, down, starts_E1, order_R)
        projected = x_MC.new_empty(rows, gate_up.shape[1])
        out = torch.empty_like(x_MC)
        results = (projected, _rows_of(out, rows), out)
        native.call("experts_forward", _table(inputs), *results, _shape(gates_MK, down))
        ctx.save_for_backward(*inputs, projected)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, projected = ctx.saved_tensors
        x_MC, gates_MK, gate_up, down = inputs[:4]
        rows = projected.shape[0]
        d_x, d_gates = torch.empty_like(x_MC), torch.empty_like(gates_MK)
        trained = any(ctx.needs_input_grad[2:4])
        d_weights = [torch.empty_like(x) if trained else None for x in (gate_up, down)]
        inner = x_MC.new_empty(rows, down.shape[2])
        scratch = (torch.empty_like(projected), inner, _rows_of(d_x, rows))
        arguments = (projected, grads[0].contiguous(), *scratch, d_x, d_gates, *d_weights)
        native.call("experts_backward", _table(inputs), *arguments, _shape(gates_MK, down))
        return d_x, d_gates, *d_weights, None


def _rows_of(sum_MC: Tensor, rows: int) -> Tensor:
    """Memory for the rows [R, C] whose sums are ``sum_MC``; with one row per token, the same."""
    return sum_MC if len(sum_MC) == rows else sum_MC.new_empty(rows, sum_MC.shape[1])


def _table(tensors: Any) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def _shape(gates_MK: Tensor, down_ECF: Tensor) -> Any:
    return (ctypes.c_int64 * 5)(*gates_MK.shape, *down_ECF.shape)


routed_experts.register("cpu", mix_experts)

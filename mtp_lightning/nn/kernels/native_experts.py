"""All experts each way in one call of C++ (``cpp/experts.cpp``): what
:class:`~mtp_lightning.nn.kernels.experts._SortedExperts` does, without its loop.

Shapes: M tokens, K chosen experts of a token, R = M * K rows, E experts, C d_model, F d_expert.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.nn.kernels import native


def fits(x_MC: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the C++ kernel takes these: fp32 on a CPU, widths of whole vectors of 16."""
    whole = down.shape[1] % 16 == 0 and down.shape[2] % 16 == 0
    weights = gate_up.is_contiguous() and down.is_contiguous()
    return whole and weights and native.fits(x_MC, gates_MK, gate_up, down)


class NativeExperts(torch.autograd.Function):
    """Keeps its input and what lies before the gate; all else is made again."""

    @staticmethod
    def forward(
        ctx: Any, x_MC: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor, chosen_MK: Tensor
    ) -> Tensor:
        x_MC, gates_MK = x_MC.contiguous(), gates_MK.contiguous()
        chosen_MK = chosen_MK.contiguous()
        n_experts, width, rows = down.shape[0], x_MC.shape[1], chosen_MK.numel()
        starts_E1, order_R = chosen_MK.new_empty(n_experts + 1), chosen_MK.new_empty(rows)
        places = (x.data_ptr() for x in (chosen_MK, starts_E1, order_R))
        native.lib().experts_sort(*places, rows, n_experts)
        projected = x_MC.new_empty(rows, gate_up.shape[1])
        rows_RC, out = x_MC.new_empty(rows, width), torch.empty_like(x_MC)
        given = (x_MC, gates_MK, gate_up, down, starts_E1, order_R)
        results = (x.data_ptr() for x in (projected, rows_RC, out))
        native.lib().experts_forward(_pointers(*given), *results, _shape(*given))
        ctx.save_for_backward(*given, projected)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, projected = ctx.saved_tensors
        x_MC, gates_MK, gate_up, down = given[:4]
        inner = x_MC.new_empty(projected.shape[0], down.shape[2])
        scratch = (torch.empty_like(projected), inner, x_MC.new_empty(len(inner), x_MC.shape[1]))
        d_x, d_gates = torch.empty_like(x_MC), torch.empty_like(gates_MK)
        needs = ctx.needs_input_grad[2]
        d_weights = [torch.empty_like(w) if needs else None for w in (gate_up, down)]
        used = (projected, grads[0].contiguous(), *scratch, d_x, d_gates, *d_weights)
        pointers = (None if x is None else x.data_ptr() for x in used)
        native.lib().experts_backward(_pointers(*given), *pointers, _shape(*given))
        return d_x, d_gates, *d_weights, None


def _pointers(*tensors: Tensor) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def _shape(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, *places: Tensor) -> Any:
    return (ctypes.c_int64 * 5)(*gates.shape, *down.shape)

"""Routed experts on a CPU: one call of C++ where that fits, else a loop over experts.

Tokens are sorted by expert, so that the rows of each expert lie together, and every product takes
the fastest kernel of ``linear.py``. The few tokens of a pass of decoding are not worth sorting.

Shapes: M tokens, K chosen experts of a token, R = M * K rows, E experts, C d_model, F d_expert.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.cpu import experts_native
from mtp_lightning.cpu.linear import matmul_transposed, uses_onednn, weight_gradient
from mtp_lightning.cpu.swiglu import gated
from mtp_lightning.nn.batch_invariant import FEW, is_batch_invariant
from mtp_lightning.nn.experts import loads, routed_experts

# An expert's rows are filled up to a multiple of this where that saves compiling kernels.
_MULTIPLE = 32


def mix_experts(
    x_MC: Tensor, chosen_MK: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """``nn.experts.routed_experts``."""
    if not torch.is_grad_enabled() and (x_MC.shape[0] <= FEW or is_batch_invariant()):
        return _one_by_one(x_MC, chosen_MK, gates_MK, gate_up, down)
    if experts_native.fits(x_MC, gate_up, down):
        return experts_native.mix_experts(x_MC, chosen_MK, gates_MK, gate_up, down)
    order_R = chosen_MK.flatten().argsort(stable=True)
    load_E = loads(chosen_MK, gate_up.shape[0])
    return _SortedExperts.apply(x_MC, gates_MK, gate_up, down, order_R, load_E)


def _one_by_one(
    x_MC: Tensor, chosen_MK: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """With one row a product is a read of the weights, and a token's result is the same, bit for
    bit, whatever other tokens are computed with it."""
    out = torch.zeros_like(x_MC)
    for x_C, row_C, experts, gates_K in zip(
        x_MC, out, chosen_MK.tolist(), gates_MK.unbind(0), strict=True
    ):
        for expert, gate in zip(experts, gates_K.unbind(0), strict=True):
            row_C.addcmul_(torch.mv(down[expert], gated(torch.mv(gate_up[expert], x_C))), gate)
    return out


@dataclass(frozen=True)
class _Layout:
    """Where the sorted rows lie. An expert's may end in rows without a token, whose gate is 0."""

    blocks: list[tuple[int, slice]]  # every expert that has tokens
    token_R: Tensor  # of every row; token 0 in rows without one
    gate_R1: Tensor
    inverse_MK: Tensor  # the row of every choice


def _lay_out(gates_MK: Tensor, order_R: Tensor, load_E: Tensor, *, multiple: int) -> _Layout:
    wide_E = (load_E + multiple - 1) // multiple * multiple
    ends = wide_E.cumsum(0)
    shift_E = (ends - wide_E) - (load_E.cumsum(0) - load_E)
    row_R = torch.arange(order_R.shape[0], device=order_R.device)
    row_R = row_R + shift_E.repeat_interleave(load_E, output_size=order_R.shape[0])
    widths = wide_E.tolist()
    starts = [0, *itertools.accumulate(widths)]
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = row_R
    token_R = order_R.new_zeros(starts[-1])
    token_R[row_R] = order_R // gates_MK.shape[1]
    gate_R1 = gates_MK.new_zeros(starts[-1], 1)
    gate_R1[row_R, 0] = gates_MK.flatten()[order_R]
    blocks = [(e, slice(starts[e], starts[e + 1])) for e, width in enumerate(widths) if width]
    return _Layout(blocks, token_R, gate_R1, inverse_R.view(gates_MK.shape))


def _sum_of_rows(y_RC: Tensor, inverse_MK: Tensor) -> Tensor:
    """``y[inverse].sum(1)`` in one pass where there is a kernel for it."""
    if y_RC.dtype in (torch.float32, torch.float64):
        return F.embedding_bag(inverse_MK, y_RC, mode="sum")
    return y_RC[inverse_MK].sum(1)


class _SortedExperts(torch.autograd.Function):
    """A loop over experts, each with its block of rows.

    The gate multiplies the inner state, F wide: its gradient then needs no output of an expert,
    and nothing C wide is kept but the sorted input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MC: Tensor,
        gates_MK: Tensor,
        gate_up: Tensor,
        down: Tensor,
        order_R: Tensor,
        load_E: Tensor,
    ) -> Tensor:
        # oneDNN compiles a kernel for every new number of rows, which takes as long as several
        # products; few numbers of rows are few kernels.
        multiple = _MULTIPLE if uses_onednn(x_MC, gate_up[0]) else 1
        layout = _lay_out(gates_MK, order_R, load_E, multiple=multiple)
        x_RC = x_MC.index_select(0, layout.token_R)
        gate_R1, y_RC = layout.gate_R1, torch.empty_like(x_RC)
        projected = []
        for expert, rows in layout.blocks:
            gate_up_rows = matmul_transposed(x_RC[rows], gate_up[expert])
            gate, up = gate_up_rows.chunk(2, dim=-1)
            inner = F.silu(gate).mul_(up).mul_(gate_R1[rows])
            y_RC[rows] = matmul_transposed(inner, down[expert])
            projected.append(gate_up_rows)
        indices = (layout.token_R, layout.inverse_MK)
        ctx.save_for_backward(x_RC, gate_R1, gate_up, down, *indices, *projected)
        ctx.blocks = layout.blocks
        return _sum_of_rows(y_RC, layout.inverse_MK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RC, gate_R1, gate_up, down, token_R, inverse_MK, *projected = ctx.saved_tensors
        d_y_RC = grads[0].index_select(0, token_R)
        d_x_RC = torch.empty_like(x_RC)
        d_gate_R1 = torch.empty_like(gate_R1)
        needs_weights = ctx.needs_input_grad[2]
        # An expert without tokens has a gradient too: zero.
        d_gate_up = torch.zeros_like(gate_up) if needs_weights else None
        d_down = torch.zeros_like(down) if needs_weights else None
        for (expert, rows), gate_up_rows in zip(ctx.blocks, projected, strict=True):
            gate, up = gate_up_rows.chunk(2, dim=-1)
            d_projected = torch.empty_like(gate_up_rows)
            d_gate, d_up = d_projected.chunk(2, dim=-1)
            d_inner = matmul_transposed(d_y_RC[rows], down[expert].t())
            silu = F.silu(gate)
            inner = silu * up
            torch.mul(d_inner, inner, out=d_up)
            torch.sum(d_up, dim=-1, keepdim=True, out=d_gate_R1[rows])
            if d_down is not None:
                d_down[expert] = weight_gradient(d_y_RC[rows], inner.mul_(gate_R1[rows]))
            d_inner.mul_(gate_R1[rows])
            torch.mul(d_inner, silu, out=d_up)
            d_inner.mul_(up)
            torch.ops.aten.silu_backward.grad_input(d_inner, gate, grad_input=d_gate)
            if d_gate_up is not None:
                d_gate_up[expert] = weight_gradient(d_projected, x_RC[rows])
            d_x_RC[rows] = matmul_transposed(d_projected, gate_up[expert].t())
        d_x_MC = _sum_of_rows(d_x_RC, inverse_MK) if ctx.needs_input_grad[0] else None
        return d_x_MC, d_gate_R1.flatten()[inverse_MK], d_gate_up, d_down, None, None


routed_experts.register("cpu", mix_experts)

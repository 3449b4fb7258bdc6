"""Products of tokens with the experts chosen for them.

Tokens are sorted by expert, so that each expert's are one block of rows. On a GPU in bf16 one
grouped product takes all blocks, on a CPU one call of C++ where that was built; elsewhere a loop
over experts takes the fastest kernel of ``matmul``. The few tokens of decoding are not worth
sorting.

Shapes: M tokens, K chosen experts of a token, R = M * K rows, E experts, C d_model, F d_expert.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.nn.kernels import native_swiglu
from mtp_lightning.nn.kernels.exact import FEW, is_exact
from mtp_lightning.nn.kernels.matmul import matmul_transposed, uses_onednn, weight_gradient
from mtp_lightning.nn.kernels.swiglu import swiglu

# A block's rows are filled up to a multiple of this where that saves compiling kernels.
_MULTIPLE = 32


def mix_experts(
    x_MC: Tensor, chosen_MK: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """``sum_j gates[:, j] * down_e(swiglu(gate_up_e(x)))`` with ``e = chosen[:, j]``, [M, C].

    Args:
        x_MC: tokens.
        chosen_MK: experts of every token.
        gates_MK: their weights.
        gate_up: [E, 2F, C].
        down: [E, C, F].
    """
    if not torch.is_grad_enabled() and (x_MC.shape[0] <= FEW or is_exact()):
        if torch.compiler.is_compiling():
            return gathered(x_MC, chosen_MK, gates_MK, gate_up, down)
        if x_MC.device.type == "cpu":
            return _one_by_one(x_MC, chosen_MK, gates_MK, gate_up, down)
    if native_swiglu.fits(x_MC, gate_up, down):
        return native_swiglu.mix_experts(x_MC, chosen_MK, gates_MK, gate_up, down)
    order_R = chosen_MK.flatten().argsort(stable=True)
    load_E = loads(chosen_MK, gate_up.shape[0])
    if fits_grouped(x_MC, down):
        return grouped(x_MC, gates_MK, gate_up, down, order_R, load_E)
    return _SortedExperts.apply(x_MC, gates_MK, gate_up, down, order_R, load_E)


def loads(chosen_MK: Tensor, n_experts: int) -> Tensor:
    """int64 [E], how many tokens each expert was chosen for."""
    # bincount looks at the numbers first, and so waits for a GPU.
    load_E = torch.zeros(n_experts, dtype=torch.int64, device=chosen_MK.device)
    chosen = chosen_MK.flatten()
    return load_E.scatter_add_(0, chosen, torch.ones_like(chosen))


def _one_by_one(
    x_MC: Tensor, chosen_MK: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """At one row a product is a read of the weights, and a token's result is the same, bit for bit,
    whatever others are computed with it."""
    out = torch.zeros_like(x_MC)
    for x_C, row_C, experts, gates_K in zip(
        x_MC, out, chosen_MK.tolist(), gates_MK.unbind(0), strict=True
    ):
        for expert, gate in zip(experts, gates_K.unbind(0), strict=True):
            row_C.addcmul_(torch.mv(down[expert], swiglu(torch.mv(gate_up[expert], x_C))), gate)
    return out


def gathered(
    x_MC: Tensor, chosen_MK: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The plain formula over the chosen experts' weights, picked out: no token waits for the host,
    and every row reads weights of its own."""
    # Products and sums, not matrix products: the compiler then reads the weights where they lie.
    projected_MKF = (gate_up[chosen_MK] * x_MC[:, None, None]).sum(-1)
    inner_MKF = swiglu(projected_MKF) * gates_MK.unsqueeze(-1)
    return (down[chosen_MK] * inner_MKF.unsqueeze(2)).sum(-1).sum(1)


def fits_grouped(x_MC: Tensor, down: Tensor) -> bool:
    """Whether ``F.grouped_mm`` is supported: bf16 on a GPU, rows of a multiple of 16 bytes."""
    aligned = down.shape[1] % 8 == 0 and down.shape[2] % 8 == 0
    return x_MC.device.type == "cuda" and x_MC.dtype == torch.bfloat16 and aligned


def grouped(
    x_MC: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor, order_R: Tensor, load_E: Tensor
) -> Tensor:
    """All experts in two grouped products; nothing waits for the device."""
    top_k = gates_MK.shape[1]
    ends_E = load_E.cumsum(0, dtype=torch.int32)
    x_RC = x_MC[order_R // top_k]
    inner_RF = swiglu(F.grouped_mm(x_RC, gate_up.transpose(1, 2), offs=ends_E))
    inner_RF = inner_RF * gates_MK.flatten()[order_R].unsqueeze(-1)
    y_RC = F.grouped_mm(inner_RF, down.transpose(1, 2), offs=ends_E)
    return y_RC[order_R.argsort()].unflatten(0, (-1, top_k)).sum(1)


@dataclass(frozen=True)
class _Layout:
    """Where the sorted rows lie. An expert's block may end in rows of no token, whose gate is 0."""

    blocks: list[tuple[int, slice]]  # every expert that has tokens
    token_R: Tensor  # whose row it is; token 0 in rows of no token
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

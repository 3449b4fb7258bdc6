"""Routed experts: every expert multiplies the tokens sent to it, and no others.

Shapes: M tokens, K chosen experts of a token, R = M * K rows, E experts, C d_model, F d_expert.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.nn.auxiliary import loads
from mtp_lightning.nn.batch_invariant import MAX_VERIFY_WIDTH
from mtp_lightning.nn.ops import Op, compute_dtype, gated, no_autocast


@Op
def routed_experts(
    x_MC: Tensor, chosen_MK: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """``sum_j gates[:, j] * down_e(silu(gate_e(x)) * up_e(x))`` with ``e = chosen[:, j]``, [M, C];
    ``gate_up`` is [E, 2F, C], the gate's matrix first, and ``down`` [E, C, F]."""
    few = not torch.is_grad_enabled() and x_MC.shape[0] <= MAX_VERIFY_WIDTH
    if few and torch.compiler.is_compiling():
        return gathered(x_MC, chosen_MK, gates_MK, gate_up, down)
    top_k = chosen_MK.shape[1]
    order_R = chosen_MK.flatten().argsort(stable=True)
    load_E = loads(chosen_MK, gate_up.shape[0])
    # A grouped product takes the ends of the experts' rows, without a device-to-host sync.
    grouped = fits_grouped(x_MC, down)
    rows_E = load_E.cumsum(0, dtype=torch.int32) if grouped else load_E.tolist()
    gate_R1 = gates_MK.flatten()[order_R].unsqueeze(-1)
    inner_RF = gated(_multiply(x_MC[order_R // top_k], gate_up, rows_E)) * gate_R1
    y_RC = _multiply(inner_RF, down, rows_E)
    return y_RC[order_R.argsort()].unflatten(0, (-1, top_k)).sum(1)


def _multiply(x_RI: Tensor, weight_EOI: Tensor, rows_E: Tensor | list[int]) -> Tensor:
    """Multiply rows sorted by expert, [R, I] -> [R, O]. ``rows_E`` is a tensor with the end of each
    expert's rows, for one grouped product, or a list of their numbers, for one product per
    expert."""
    if isinstance(rows_E, Tensor):
        return F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=rows_E)
    experts = zip(x_RI.split(rows_E), weight_EOI.unbind(0), strict=True)
    return torch.cat([F.linear(x, weight) for x, weight in experts])


def fits_grouped(x_MC: Tensor, down: Tensor) -> bool:
    """Whether ``F.grouped_mm`` is supported: bf16 on a GPU, rows of a multiple of 16 bytes."""
    aligned = down.shape[1] % 8 == 0 and down.shape[2] % 8 == 0
    return x_MC.device.type == "cuda" and x_MC.dtype == torch.bfloat16 and aligned


def _on_meta(
    x_MC: Tensor, chosen_MK: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """:func:`routed_experts` on the meta device, where loads are unknown: all rows go through one
    expert, which takes as many FLOPs."""
    top_k = chosen_MK.shape[1]
    x_RC = x_MC.repeat_interleave(top_k, dim=0)
    inner_RF = gated(F.linear(x_RC, gate_up[0])) * gates_MK.reshape(-1, 1)
    return F.linear(inner_RF, down[0]).unflatten(0, (-1, top_k)).sum(1)


routed_experts.register("meta", _on_meta)


def gathered(
    x_MC: Tensor, chosen_MK: Tensor, gates_MK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """:func:`routed_experts` with the chosen experts' weights gathered for every token: no
    device-to-host sync, for few tokens in a compiled pass."""
    # Elementwise products and sums instead of matrix products: the compiler then fuses the gather
    # and reads the weights in place.
    projected_MKF = (gate_up[chosen_MK] * x_MC[:, None, None]).sum(-1)
    inner_MKF = gated(projected_MKF) * gates_MK.unsqueeze(-1)
    return (down[chosen_MK] * inner_MKF.unsqueeze(2)).sum(-1).sum(1)


class Experts(nn.Module):
    """E SwiGLU layers; gate and up are one matrix per expert, gate first."""

    may_be_bf16: ClassVar[bool] = True

    def __init__(self, d_model: int, d_expert: int, n_experts: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_expert, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_expert))

    def forward(self, x_MC: Tensor, chosen_MK: Tensor, gates_MK: Tensor) -> Tensor:
        """``sum_j gates[:, j] * expert_{chosen[:, j]}(x)``, [M, C]."""
        # On CPUs the few rows of an expert are faster in fp32 than in autocast's dtype.
        dtype = x_MC.dtype if x_MC.device.type == "cpu" else compute_dtype(x_MC)
        gate_up, down = self.gate_up.to(dtype), self.down.to(dtype)
        with no_autocast(x_MC):
            return routed_experts(x_MC.to(dtype), chosen_MK, gates_MK.to(dtype), gate_up, down)

    def extra_repr(self) -> str:
        n_experts, d_model, d_expert = self.down.shape
        return f"{n_experts} x ({d_model}, {d_expert})"

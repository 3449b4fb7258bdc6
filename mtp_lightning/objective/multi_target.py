"""Cross-entropy of one distribution with several targets, through logits that are made once.

    sum_k c_k * sum_i -log softmax(h_i @ W.T)[target_k,i]

Its gradient by the logits is ``(sum_k c_k) softmax - sum_k c_k one_hot(target_k)``: one pass over
a chunk of logits serves all targets. Chunks as in ``cross_entropy``.

Shapes: M positions (B x T), C d_model, V vocabulary, R positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX
from mtp_lightning.nn.kernels.matmul import matmul_transposed, weight_gradient
from mtp_lightning.objective.cross_entropy import compute_dtype, log_probs_by_chunk


class _MultiTarget(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight_VC: Tensor,
        hidden: Tensor,
        targets: Sequence[Tensor],
        coefficients: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        needs_weight, needs_hidden = ctx.needs_input_grad[:2]
        dtype = compute_dtype(hidden)
        weight = weight_VC.detach().to(dtype)
        h_MC = hidden.detach().reshape(-1, hidden.shape[-1]).to(dtype)
        flat = [t.reshape(-1, 1) for t in targets]
        sums = torch.zeros(len(targets), dtype=torch.float64, device=weight.device)
        d_weight = torch.zeros_like(weight_VC) if needs_weight else None
        d_h = torch.empty_like(h_MC, dtype=hidden.dtype) if needs_hidden else None
        with torch.autocast(weight.device.type, enabled=False):
            for place, chunk_RV in log_probs_by_chunk(h_MC, weight):
                ones, minus = [], []
                for index, (target_M1, c) in enumerate(zip(flat, coefficients, strict=True)):
                    target_R1 = target_M1[place]
                    valid_R1 = target_R1 != IGNORE_INDEX
                    ones.append(target_R1.clamp(min=0))
                    sums[index] -= (chunk_RV.gather(1, ones[-1]) * valid_R1).double().sum()
                    minus.append(valid_R1.to(chunk_RV.dtype).mul_(-c))
                if d_h is None and d_weight is None:
                    continue
                minus_RK = torch.cat(minus, dim=1)
                d_logits_RV = chunk_RV.exp_().mul_(-minus_RK.sum(1, keepdim=True))
                # One target at a time: two depths of a row may have the same token.
                for k, one in enumerate(ones):
                    d_logits_RV.scatter_add_(1, one, minus_RK[:, k : k + 1])
                d_logits_RV = d_logits_RV.to(dtype)
                if d_h is not None:
                    d_h[place] = matmul_transposed(d_logits_RV, weight.t())
                if d_weight is not None:
                    d_weight.add_(weight_gradient(d_logits_RV, h_MC[place]))
        ctx.gradients = (d_weight, None if d_h is None else d_h.view_as(hidden))
        ctx.mark_non_differentiable(sums)
        return (sums * sums.new_tensor(coefficients)).sum().float(), sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_weight, d_hidden = ctx.gradients
        # They are handed on, not kept: a second backward through the same graph has none.
        del ctx.gradients
        for tensor in (d_weight, d_hidden):
            if tensor is not None:
                tensor.mul_(grads[0])
        return d_weight, d_hidden, None, None


def multi_target_cross_entropy(
    weight_VC: Tensor,
    hidden: Tensor,
    targets: Sequence[Tensor],
    coefficients: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The weighted sum over ``targets`` of one distribution's cross-entropy.

    Args:
        weight_VC: the head's weight [V, C].
        hidden: [..., C], ready for the head.
        targets: token ids [...], one tensor a depth; -100 is ignored.
        coefficients: one factor a depth.

    Returns:
        The weighted total, a differentiable fp32 scalar, and the plain sum of every depth's
        losses [len(targets)], fp64, without a gradient.
    """
    return _MultiTarget.apply(weight_VC, hidden, list(targets), list(coefficients))

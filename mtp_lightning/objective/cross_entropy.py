"""Cross-entropy of several prediction depths through one shared head, chunk by chunk.

The logits of all depths would be (D + 1) x B x T x V numbers. Here they exist for one chunk of
positions of one depth at a time: the forward pass turns a chunk's logits into the gradients of
its hidden states and of the head's weight at once and drops them, so nothing of size V is kept
but one gradient of the weight, shared by all depths.

Shapes: M positions (B x T), C d_model, V vocabulary, R positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX
from mtp_lightning.nn.kernels.matmul import matmul_transposed, weight_gradient

# Numbers in one chunk of logits. On a CPU a chunk should stay in the cache between the passes
# over it; on a GPU it must be large enough to fill the device. See benchmarks/head.py.
_CHUNK_NUMEL = {"cpu": 2**21, "cuda": 2**27}
_MIN_CHUNK_ROWS = 256


@dataclass(frozen=True)
class DepthLoss:
    """One depth's share of the objective.

    Attributes:
        hidden: [..., C] hidden states, ready for the head.
        targets: [...] token ids; -100 is ignored.
        coefficient: factor of this depth's summed loss: lambda_k / valid targets of the step.
        train_head: whether the head's weight gets a gradient from this depth.
    """

    hidden: Tensor
    targets: Tensor
    coefficient: float
    train_head: bool = True


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Positions whose logits exist at once."""
    numel = _CHUNK_NUMEL.get(device.type, _CHUNK_NUMEL["cuda"])
    return max(_MIN_CHUNK_ROWS, numel // vocab_size)


def log_probs_by_chunk(h_MC: Tensor, weight_VC: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``log_softmax(h @ weight.T)`` in fp32, in chunks of positions, without autograd.

    Yields:
        The chunk's place in M, and its log-probabilities [R, V], which the caller may overwrite.
    """
    rows = chunk_rows(weight_VC.shape[0], h_MC.device)
    for start in range(0, h_MC.shape[0], rows):
        place = slice(start, min(start + rows, h_MC.shape[0]))
        logits_RV = matmul_transposed(h_MC[place], weight_VC)
        chunk_RV = torch.log_softmax(logits_RV, dim=-1, dtype=torch.float32)
        # A generator keeps its names alive while it waits: two chunks would exist at once.
        del logits_RV
        yield place, chunk_RV
        del chunk_RV


def compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def add_depth(
    weight_VC: Tensor,
    depth: DepthLoss,
    sum_: Tensor,
    d_weight: Tensor | None,
    *,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """One depth's loss, and its gradients, without autograd.

    Args:
        weight_VC: the shared head's weight.
        depth: the depth.
        sum_: fp64 scalar that the depth's summed loss is added to, in place.
        d_weight: the weight's gradient so far; added to in place, made where it is None.
        needs_hidden: whether the hidden state's gradient is wanted.
        needs_weight: whether the weight's is.

    Returns:
        The gradient of ``coefficient * loss`` by the hidden state, or None; and ``d_weight``.
    """
    h = depth.hidden
    dtype = compute_dtype(h)
    weight = weight_VC.detach().to(dtype)
    trains_weight = needs_weight and depth.train_head
    with torch.autocast(weight.device.type, enabled=False):
        h_MC = h.detach().reshape(-1, h.shape[-1]).to(dtype)
        targets_M = depth.targets.reshape(-1)
        d_h = torch.empty_like(h_MC, dtype=h.dtype) if needs_hidden else None
        for place, chunk_RV in log_probs_by_chunk(h_MC, weight):
            target_R1 = targets_M[place].unsqueeze(-1)
            valid_R1 = target_R1 != IGNORE_INDEX
            target_R1 = target_R1.clamp(min=0)
            nll_R1 = -chunk_RV.gather(1, target_R1) * valid_R1
            sum_ += nll_R1.double().sum()
            if d_h is None and not trains_weight:
                continue
            # softmax - one_hot: the gradient of a row's loss by its logits.
            d_logits_RV = chunk_RV.exp_()
            d_logits_RV.scatter_add_(
                1, target_R1, d_logits_RV.new_full((1, 1), -1.0).expand_as(target_R1)
            )
            d_logits_RV = d_logits_RV.to(dtype)
            # The coefficient and the mask go onto the C-wide factors, not the V-wide one.
            scale_R1 = valid_R1 * depth.coefficient
            if d_h is not None:
                d_h_RC = matmul_transposed(d_logits_RV, weight.t())
                torch.mul(d_h_RC, scale_R1, out=d_h[place])
            if trains_weight:
                part_VC = weight_gradient(d_logits_RV, h_MC[place] * valid_R1)
                if d_weight is None:
                    # Laid out as weight_gradient gives its parts: adding across layouts is slow.
                    d_weight = weight_VC.new_zeros(weight_VC.shape[::-1]).t()
                d_weight.add_(part_VC, alpha=depth.coefficient)
                del part_VC
            del chunk_RV, d_logits_RV
    return None if d_h is None else d_h.view_as(h), d_weight


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight_VC: Tensor, depths: Sequence[DepthLoss], *hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs_weight, needs_hidden = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        d_weight = None
        d_hidden: list[Tensor | None] = []
        sums = torch.zeros(len(depths), dtype=torch.float64, device=weight_VC.device)
        for index, (depth, h) in enumerate(zip(depths, hidden, strict=True)):
            d_h, d_weight = add_depth(
                weight_VC,
                replace(depth, hidden=h),
                sums[index],
                d_weight,
                needs_hidden=needs_hidden[index],
                needs_weight=needs_weight,
            )
            d_hidden.append(d_h)
        ctx.gradients = (d_weight, d_hidden)
        ctx.mark_non_differentiable(sums)
        coefficients = sums.new_tensor([depth.coefficient for depth in depths])
        return (sums * coefficients).sum().float(), sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_weight, d_hidden = ctx.gradients
        # They are handed on, not kept: a second backward through the same graph has none.
        del ctx.gradients
        for tensor in (d_weight, *d_hidden):
            if tensor is not None:
                tensor.mul_(grads[0])
        return d_weight, None, *d_hidden


def weighted_cross_entropy(weight_VC: Tensor, depths: Sequence[DepthLoss]) -> tuple[Tensor, Tensor]:
    """``sum_k coefficient_k * sum_i -log softmax(h_k,i @ weight.T)[target_k,i]``.

    Args:
        weight_VC: the shared head's weight [V, C].
        depths: every depth to count; at least one.

    Returns:
        The weighted total, a differentiable fp32 scalar, and the plain sum of every depth's
        losses [len(depths)], fp64, without a gradient.
    """
    assert depths
    return _WeightedCrossEntropy.apply(weight_VC, list(depths), *(d.hidden for d in depths))

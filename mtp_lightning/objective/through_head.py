"""From hidden states through the shared head to losses and their gradients, chunk by chunk.

The logits of all depths would be (D + 1) x B x T x V numbers. Here they exist for one chunk of
positions of one hidden state at a time: a chunk's logits become the gradients of its hidden states
and of the head's weight at once and are dropped, so nothing of size V is kept but one gradient of
the weight, shared by all depths.

Shapes: M positions (B x T), C d_model, V vocabulary, R positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX
from mtp_lightning.nn.kernels.matmul import matmul_transposed, weight_gradient
from mtp_lightning.objective.terms.base import Chunk, Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy

# Numbers in one chunk of logits. On a CPU a chunk should stay in the cache between the passes
# over it; on a GPU it must be large enough to fill the device. See benchmarks/head.py.
_CHUNK_NUMEL = {"cpu": 2**21, "cuda": 2**27}
_MIN_CHUNK_ROWS = 256


@dataclass(frozen=True, eq=False)
class DepthTarget:
    """What one depth is to predict, and how much it counts.

    Attributes:
        depth: k.
        tokens: [...] token ids; -100 is ignored.
        coefficient: factor of the depth's summed loss: its weight / valid targets of the step. A
            loss of factor 0 that nothing learns from is not computed.
        term: what it is trained on.
    """

    depth: int
    tokens: Tensor
    coefficient: float
    term: Term


@dataclass(eq=False)
class Prediction:
    """A hidden state on its way through the head.

    Attributes:
        hidden: [..., C], ready for the head.
        targets: of the depths that this state predicts: one, or with ``parameter_free`` all, whose
            logits are then made once.
        train_head: whether the head's weight gets a gradient from it.
        needs_gradient: whether the hidden state does.
        gradient: that gradient, [..., C], once it is known.
    """

    hidden: Tensor
    targets: Sequence[DepthTarget]
    train_head: bool = True
    needs_gradient: bool = True
    gradient: Tensor | None = None


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Positions whose logits exist at once."""
    numel = _CHUNK_NUMEL.get(device.type, _CHUNK_NUMEL["cuda"])
    return max(_MIN_CHUNK_ROWS, numel // vocab_size)


def log_probs_by_chunk(h_MC: Tensor, weight_VC: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``log_softmax(h @ weight.T)`` in chunks of positions, without autograd; in fp32, in a double
    precision model in fp64.

    Yields:
        The chunk's place in M, and its log-probabilities [R, V], which the caller may overwrite.
    """
    rows = chunk_rows(weight_VC.shape[0], h_MC.device)
    for start in range(0, h_MC.shape[0], rows):
        place = slice(start, min(start + rows, h_MC.shape[0]))
        logits_RV = matmul_transposed(h_MC[place], weight_VC)
        dtype = torch.promote_types(logits_RV.dtype, torch.float32)
        chunk_RV = torch.log_softmax(logits_RV, dim=-1, dtype=dtype)
        # A generator keeps its names alive while it waits: two chunks would exist at once.
        del logits_RV
        yield place, chunk_RV
        del chunk_RV


@torch.no_grad()
def through_head(
    weight_VC: Tensor,
    prediction: Prediction,
    sums: Tensor,
    d_weight: Tensor | None = None,
    *,
    needs_weight: bool = False,
) -> Tensor | None:
    """The losses of one hidden state, and the gradients of ``sum_k coefficient_k * loss_k``.

    Args:
        weight_VC: the shared head's weight.
        prediction: its ``gradient`` is set where it is needed.
        sums: fp64 [number of targets]; each target's summed loss is added to it, in place.
        d_weight: the weight's gradient so far; added to in place, made where it is None.
        needs_weight: whether the weight's gradient is wanted.

    Returns:
        ``d_weight``.
    """
    h = prediction.hidden
    dtype = _compute_dtype(h)
    weight = weight_VC.detach().to(dtype)
    trains_weight = needs_weight and prediction.train_head
    learns = prediction.needs_gradient or trains_weight
    if not learns and not any(target.coefficient for target in prediction.targets):
        return d_weight
    with torch.autocast(weight.device.type, enabled=False):
        h_MC = h.detach().reshape(-1, h.shape[-1]).to(dtype)
        d_h = torch.empty_like(h_MC, dtype=h.dtype) if prediction.needs_gradient else None
        for place, chunk_RV in log_probs_by_chunk(h_MC, weight):
            if d_h is None and not trains_weight:
                _add_values(prediction.targets, place, chunk_RV, sums)
                continue
            if len(prediction.targets) == 1:
                d_logits_RV, scale_R1 = _one_target(prediction.targets[0], place, chunk_RV, sums)
            else:
                d_logits_RV = _several_targets(prediction.targets, place, chunk_RV, sums)
                scale_R1 = None
            del chunk_RV
            d_logits_RV = d_logits_RV.to(dtype)
            # The coefficient and the mask of a single target go onto the C-wide factors, not onto
            # the V-wide one.
            if d_h is not None:
                d_h_RC = matmul_transposed(d_logits_RV, weight.t())
                if scale_R1 is None:
                    d_h[place] = d_h_RC
                else:
                    torch.mul(d_h_RC, scale_R1 * prediction.targets[0].coefficient, out=d_h[place])
            if trains_weight:
                h_RC = h_MC[place] if scale_R1 is None else h_MC[place] * scale_R1
                part_VC = weight_gradient(d_logits_RV, h_RC)
                if d_weight is None:
                    # Laid out as weight_gradient gives its parts: adding across layouts is slow.
                    d_weight = weight_VC.new_zeros(weight_VC.shape[::-1]).t()
                alpha = 1.0 if scale_R1 is None else prediction.targets[0].coefficient
                d_weight.add_(part_VC, alpha=alpha)
                del part_VC
            del d_logits_RV
    if d_h is not None:
        prediction.gradient = d_h.view_as(h)
    return d_weight


def _targets_of(target: DepthTarget, place: slice) -> tuple[Tensor, Tensor]:
    """Token ids [R] of a chunk, and which of them count [R]."""
    tokens_R = target.tokens.reshape(-1)[place]
    return tokens_R.clamp(min=0), tokens_R != IGNORE_INDEX


def _add_values(
    targets: Sequence[DepthTarget], place: slice, chunk_RV: Tensor, sums: Tensor
) -> None:
    for index, target in enumerate(targets):
        tokens_R, valid_R = _targets_of(target, place)
        value_R = target.term.value(Chunk(target.depth, chunk_RV, tokens_R))
        sums[index] += (value_R * valid_R).double().sum()


def _one_target(
    target: DepthTarget, place: slice, chunk_RV: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient by the logits before mask and coefficient, and the mask [R, 1]."""
    tokens_R, valid_R = _targets_of(target, place)
    value_R, d_logits_RV = target.term.gradient(Chunk(target.depth, chunk_RV, tokens_R))
    sums[0] += (value_R * valid_R).double().sum()
    return d_logits_RV, valid_R.unsqueeze(-1)


def _several_targets(
    targets: Sequence[DepthTarget], place: slice, chunk_RV: Tensor, sums: Tensor
) -> Tensor:
    """The gradient by logits that all targets share, mask and coefficients included.

    Cross-entropy's is ``(sum_k c_k) softmax - sum_k c_k one_hot(target_k)``: one pass over the
    chunk serves all such targets.
    """
    plain: list[tuple[Tensor, Tensor]] = []
    others_RV: Tensor | None = None
    for index, target in enumerate(targets):
        tokens_R, valid_R = _targets_of(target, place)
        if isinstance(target.term, CrossEntropy):
            value_R = target.term.value(Chunk(target.depth, chunk_RV, tokens_R))
            minus_R1 = valid_R.to(chunk_RV.dtype).mul_(-target.coefficient).unsqueeze(-1)
            plain.append((tokens_R.unsqueeze(-1), minus_R1))
        else:
            copy = Chunk(target.depth, chunk_RV.clone(), tokens_R)
            value_R, d_logits_RV = target.term.gradient(copy)
            d_logits_RV = d_logits_RV * (valid_R * target.coefficient).unsqueeze(-1)
            others_RV = d_logits_RV if others_RV is None else others_RV.add_(d_logits_RV)
        sums[index] += (value_R * valid_R).double().sum()
    minus_RK = torch.cat([minus_R1 for _, minus_R1 in plain], dim=1)
    d_logits_RV = chunk_RV.exp_().mul_(-minus_RK.sum(1, keepdim=True))
    # One target at a time: two depths of a row may have the same token.
    for target_R1, minus_R1 in plain:
        d_logits_RV.scatter_add_(1, target_R1, minus_R1)
    return d_logits_RV if others_RV is None else d_logits_RV.add_(others_RV)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

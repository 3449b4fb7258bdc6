"""The loss of depths that one mixture joins (``mtp/rank.py``), as one node of the autograd graph.

Every depth is predicted by the same r components, weighed by what they said of the tokens before:
no depth's loss is its own. So all depths and components of some positions go through the head
together, fewer positions at a time by as much: the chunk's logits are no more numbers than those of
one depth elsewhere (``through_head.py``), and nothing of size V is kept but the weight's gradient.

Shapes: M positions (B x T), R of them in a chunk, K depths 0 .. the deepest that is computed,
A components, C d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import BranchPoint
from mtp_lightning.mtp.rank import JointLinearMTP
from mtp_lightning.nn.mixture import pack
from mtp_lightning.nn.ops import exp_, matmul_transposed
from mtp_lightning.objective.terms.base import Chunk, Teacher
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.through_head import (
    ChunkTarget,
    DepthTarget,
    HeadWeight,
    chunk_rows,
    compute_dtype,
    log_probs,
)


def mixture_loss(
    model: MTPModel, final_BTC: Tensor, at: BranchPoint, targets: Sequence[DepthTarget]
) -> tuple[Tensor, Tensor]:
    """:func:`~mtp_lightning.objective.stack_loss.stack_loss` of a :class:`JointLinearMTP`.

    Args:
        model: the model.
        final_BTC: the trunk's output, and ...
        at: ... the branch point, both from :meth:`MTPModel.run_trunk`.
        targets: of the main prediction, then of the depths to compute, in order.
    """
    stack = model.mtp
    assert isinstance(stack, JointLinearMTP)
    deepest = max(target.depth for target in targets)
    parts = [stack.components(k, final_BTC) for k in range(deepest + 1)]
    parts_MKAC = torch.stack(parts, dim=2).flatten(0, 1)
    # What is said of the tokens between decides the weights, whether anybody is scored for it.
    said = [at.tokens_at(k + 1).flatten() for k in range(deepest)]
    log_weights_MA = stack.log_weights(final_BTC).flatten(0, 1)
    return _MixtureLoss.apply(model.head.weight, parts_MKAC, log_weights_MA, said, list(targets))


class _MixtureLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight_VC: Tensor,
        parts_MKAC: Tensor,
        log_weights_MA: Tensor,
        said: list[Tensor],
        targets: list[DepthTarget],
    ) -> tuple[Tensor, Tensor]:
        needs_weight, *needs = ctx.needs_input_grad[:3]
        head = HeadWeight(weight_VC, needs_gradient=needs_weight)
        dtype = compute_dtype(parts_MKAC)
        weight, parts = weight_VC.detach().to(dtype), parts_MKAC.detach().to(dtype)
        log_weights = log_weights_MA.detach()
        sums = torch.zeros(len(targets), dtype=torch.float64, device=weight.device)
        d_parts = torch.empty_like(parts_MKAC) if needs[0] else None
        d_log_weights = torch.empty_like(log_weights_MA) if needs[1] else None
        total, per_position = parts.shape[0], parts.shape[1] * parts.shape[2]
        rows = max(1, chunk_rows(weight.shape[0], weight.device) // per_position)
        main_MX = None
        if any(target.term.needs_teacher for target in targets):
            main_MX = pack(parts[:, 0], log_weights)
        with torch.autocast(weight.device.type, enabled=False):
            for start in range(0, total, rows):
                place = slice(start, min(start + rows, total))
                h_NC = parts[place].flatten(0, 2)
                log_p = log_probs(h_NC, weight).view(-1, *parts.shape[1:3], weight.shape[0])
                own = [ChunkTarget(target, place) for target in targets]
                said_R = [token_M[place] for token_M in said]
                teachers = {} if main_MX is None else _teachers(main_MX, weight, own, place)
                learn = _of_tokens if all(_is_plain(target) for target in own) else _of_all
                d_logits, d_log_w = learn(log_p, log_weights[place], said_R, own, teachers, sums)
                del log_p
                d_logits_NV = d_logits.flatten(0, 2).to(dtype)
                if d_log_weights is not None:
                    d_log_weights[place] = d_log_w.to(d_log_weights.dtype)
                if d_parts is not None:
                    d_h_NC = matmul_transposed(d_logits_NV, weight.t())
                    d_parts[place] = d_h_NC.view_as(d_parts[place]).to(d_parts.dtype)
                if head.needs_gradient:
                    head.add(d_logits_NV, h_NC)
        ctx.gradients = (head.gradient, d_parts, d_log_weights)
        ctx.mark_non_differentiable(sums)
        weighted = [part * target.coefficient for part, target in zip(sums, targets, strict=True)]
        loss_dtype = torch.promote_types(weight_VC.dtype, torch.float32)
        return torch.stack(weighted).sum().to(loss_dtype), sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        del ctx.gradients
        for tensor in gradients:
            if tensor is not None:
                tensor.mul_(grads[0])
        return *gradients, None, None


def _is_plain(target: ChunkTarget) -> bool:
    return isinstance(target.term, CrossEntropy)


def _weights_after(log_w_RA: Tensor, said: Sequence[Tensor]) -> list[Tensor]:
    """``log w^k`` [R, A] of every depth, from what the components said of the tokens before it,
    ``log p_a`` [R, A] each."""
    found = [log_w_RA]
    for said_RA in said:
        found.append((found[-1] + said_RA).log_softmax(-1))
    return found


def _of_token(log_p_RAV: Tensor, token_R: Tensor) -> Tensor:
    """``log p_a`` of a token, [R, A]."""
    index = token_R[:, None, None].expand(-1, log_p_RAV.shape[1], 1)
    return log_p_RAV.gather(-1, index).squeeze(-1)


def _of_tokens(
    log_p_RKAV: Tensor,
    log_w_RA: Tensor,
    said_R: Sequence[Tensor],
    targets: Sequence[ChunkTarget],
    teachers: dict[int, Teacher],
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy alone: what counts of a component is what it says of single tokens.

    Returns:
        The gradients by logits [R, K, A, V], in the place of the log-probabilities, and by
        ``log_w_RA``.
    """
    depths = log_p_RKAV.shape[1]
    # The tokens between are also the shallower depths' targets, wherever these count.
    tokens = [*said_R, *(t.tokens_R for t in targets if t.depth == depths - 1)][:depths]
    with torch.enable_grad():
        found = [_of_token(log_p_RKAV[:, k], tokens[k]) for k in range(depths)]
        held_RKA = torch.stack(found, dim=1).detach().requires_grad_()
        start_RA = log_w_RA.detach().requires_grad_()
        weights = _weights_after(start_RA, held_RKA[:, :-1].unbind(1))
        loss = held_RKA.new_zeros(())
        for index, target in enumerate(targets):
            k = target.depth
            value_R = -(weights[k] + held_RKA[:, k]).logsumexp(-1)
            loss = loss + _count(value_R, target, sums, index)
        d_held_RKA, d_log_w_RA = torch.autograd.grad(loss, (held_RKA, start_RA))
    # log p = log_softmax(z): what falls to the token's logit is taken from all by their share.
    d_logits = exp_(log_p_RKAV).mul_(-d_held_RKA.unsqueeze(-1))
    for k, token_R in enumerate(tokens):
        place = token_R[:, None, None].expand(-1, d_held_RKA.shape[2], 1)
        d_logits[:, k].scatter_add_(-1, place, d_held_RKA[:, k].unsqueeze(-1))
    return d_logits, d_log_w_RA


def _of_all(
    log_p_RKAV: Tensor,
    log_w_RA: Tensor,
    said_R: Sequence[Tensor],
    targets: Sequence[ChunkTarget],
    teachers: dict[int, Teacher],
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Terms of whole distributions, by autograd; arguments and result as :func:`_of_tokens`."""
    with torch.enable_grad():
        log_p = log_p_RKAV.detach().requires_grad_()
        start_RA = log_w_RA.detach().requires_grad_()
        held = [_of_token(log_p[:, k], token_R) for k, token_R in enumerate(said_R)]
        weights = _weights_after(start_RA, held)
        loss = log_p.new_zeros(())
        mixed: dict[int, Tensor] = {}
        for index, target in enumerate(targets):
            k = target.depth
            if k not in mixed:
                mixed[k] = (weights[k].unsqueeze(-1) + log_p[:, k]).logsumexp(1)
            chunk = Chunk(k, mixed[k], target.tokens_R, None, teachers.get(k))
            loss = loss + _count(target.term.value(chunk), target, sums, index)
        d_log_p, d_log_w_RA = torch.autograd.grad(loss, (log_p, start_RA))
    total = d_log_p.sum(-1, keepdim=True)
    return d_log_p - exp_(log_p_RKAV).mul_(total), d_log_w_RA


def _count(value_R: Tensor, target: ChunkTarget, sums: Tensor, index: int) -> Tensor:
    """A target's part of the loss; its sum is noted."""
    sums[index] += (value_R.detach() * target.counts_R).double().sum()
    return (value_R * target.counts_R.to(value_R.dtype)).sum() * target.coefficient


def _teachers(
    main_MX: Tensor, weight: Tensor, targets: Sequence[ChunkTarget], place: slice
) -> dict[int, Teacher]:
    """The main prediction of every depth's tokens at some positions."""
    found = {}
    for k in {target.depth for target in targets if target.term.needs_teacher}:
        # What lies behind the window has no teacher, and does not count.
        rows = torch.arange(place.start + k, place.stop + k, device=main_MX.device)
        main_RX = main_MX[rows % main_MX.shape[0]]
        found[k] = Teacher(log_probs(main_RX, weight), main_RX[:, : weight.shape[1]])
    return found

"""Gloeckle's memory order (Gloeckle et al. 2024, section 2, fig. 2) for heads that do not read
each other.

The trunk runs forward once. Then every head in turn runs forward, through the loss, and backward;
its activations are freed before the next one starts. What the heads say adds up at the branch
point, from where one backward pass goes through the trunk. So the peak holds the activations of
the trunk and of one head, whatever D is; the gradients are those of the joint backward pass.

All of that happens in the forward pass of one autograd function, which keeps the heads' gradients
and hands them on in its backward pass. To autograd, and to data parallelism with its hooks on
every parameter, it is a node like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtp_lightning.mtp.independent import IndependentMTP
from mtp_lightning.nn.moe import collecting_balance_losses, report_balance_losses
from mtp_lightning.objective.cross_entropy import DepthLoss, add_depth

if TYPE_CHECKING:
    from mtp_lightning.model import MTPModel, Reading


@dataclass(frozen=True)
class _Work:
    model: MTPModel
    stack: IndependentMTP
    reading: Reading
    # Depth -> targets and coefficient, depth 0 first.
    depths: dict[int, tuple[Tensor, float]]
    grad: bool
    balance: float


def _one_head(
    work: _Work,
    k: int,
    weight: Tensor,
    branch: Tensor,
    sum_: Tensor,
    d_weight: Tensor | None,
    *,
    needs_branch: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Depth ``k`` forward, through the loss, and backward; its activations end with this call.

    Args:
        sum_, d_weight, needs_weight: as in :func:`add_depth`.
        needs_branch: whether the branch's gradient is wanted.

    Returns:
        The gradients of the branch and of the head's weight (so far), and those of the depth's
        parameters; none of the latter where gradients are off.
    """
    targets, coefficient = work.depths[k]
    with torch.set_grad_enabled(work.grad), collecting_balance_losses() as balances:
        leaf = branch.detach().requires_grad_(needs_branch)
        hidden = work.model.predict(k, replace(work.reading, branch=leaf), leaf)
    report_balance_losses(balances)
    d_hidden, d_weight = add_depth(
        weight,
        DepthLoss(hidden, targets, coefficient),
        sum_,
        d_weight,
        needs_hidden=hidden.requires_grad,
        needs_weight=needs_weight,
    )
    if d_hidden is None:
        return None, d_weight, []
    own = work.stack.parameters_of(k)
    # A head's own experts are balanced in the same backward pass.
    grads = torch.autograd.grad(
        [hidden, *balances],
        [leaf, *own] if needs_branch else own,
        [d_hidden, *(torch.full_like(loss, work.balance) for loss in balances)],
        allow_unused=True,
    )
    return (grads[0], d_weight, list(grads[1:])) if needs_branch else (None, d_weight, list(grads))


class _HeadByHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: _Work, weight: Tensor, final: Tensor, branch: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, needs_weight, needs_final, needs_branch, *_ = ctx.needs_input_grad
        sums = torch.zeros(len(work.depths), dtype=torch.float64, device=weight.device)
        d_final = d_branch = d_weight = None
        d_parameters: list[Tensor | None] = []
        for index, (k, (targets, coefficient)) in enumerate(work.depths.items()):
            if k == 0:
                depth = DepthLoss(final, targets, coefficient)
                d_final, d_weight = add_depth(
                    weight,
                    depth,
                    sums[index],
                    d_weight,
                    needs_hidden=work.grad and needs_final,
                    needs_weight=work.grad and needs_weight,
                )
                continue
            d_leaf, d_weight, d_own = _one_head(
                work,
                k,
                weight,
                branch,
                sums[index],
                d_weight,
                needs_branch=work.grad and needs_branch,
                needs_weight=work.grad and needs_weight and work.model.mtp.trains_head,
            )
            d_parameters += d_own
            if d_leaf is not None:
                d_branch = d_leaf if d_branch is None else d_branch.add_(d_leaf)
        ctx.gradients = [d_weight, d_final, d_branch, *d_parameters]
        ctx.mark_non_differentiable(sums)
        coefficients = sums.new_tensor([coefficient for _, coefficient in work.depths.values()])
        return (sums * coefficients).sum().float(), sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        # They are handed on, not kept: a second backward through the same graph has none.
        del ctx.gradients
        for tensor in gradients:
            if tensor is not None:
                tensor.mul_(grads[0])
        return None, *gradients


def head_by_head_loss(
    model: MTPModel,
    reading: Reading,
    active: Sequence[int],
    targets: Sequence[Tensor],
    coefficients: Sequence[float],
    *,
    balance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Depth 0 and the ``active`` depths, one after another, forward and backward.

    Args:
        model: its stack is an :class:`IndependentMTP`.
        reading: what :meth:`MTPModel.read` gave.
        active: MTP depths, in order.
        targets: of depth 0 and of the active depths, [B, T] each.
        coefficients: of the same depths' summed losses.
        balance: factor of the balance losses of the heads' experts; they train the heads and are
            left out of the total.

    Returns:
        The weighted total, a differentiable fp32 scalar, and the plain sums of the losses
        [1 + len(active)], fp64, without a gradient; both as
        :func:`~mtp_lightning.objective.cross_entropy.weighted_cross_entropy` gives them.
    """
    stack = model.mtp
    assert isinstance(stack, IndependentMTP)
    depths = dict(zip((0, *active), zip(targets, coefficients, strict=True), strict=True))
    work = _Work(model, stack, reading, depths, torch.is_grad_enabled(), balance)
    # Only parameters that the pass uses: to the rest, autograd and data parallelism see no path.
    parameters = [p for k in active for p in stack.parameters_of(k)]
    return _HeadByHead.apply(work, model.head.weight, reading.final, reading.branch, *parameters)

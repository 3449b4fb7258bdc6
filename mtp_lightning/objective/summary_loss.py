"""The loss of a head with an unembedding of its own, chunk by chunk.

As for the shared head (``through_head.py``), the logits exist for one chunk of positions at a time
and become gradients at once. The node's forward pass makes them, its backward pass hands them on.

Shapes: B batch, T positions, M = B x T, C d_model, V vocabulary, R positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import mtp_lightning.objective.summaries.bag
import mtp_lightning.objective.summaries.order  # noqa: F401  (both register themselves)
from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import BranchPoint
from mtp_lightning.mtp.future import Future
from mtp_lightning.mtp.summary import Summary
from mtp_lightning.nn.ops import matmul_transposed
from mtp_lightning.objective.stack_loss import one_state_loss
from mtp_lightning.objective.summaries.base import SummaryTerm
from mtp_lightning.objective.through_head import DepthTarget, HeadWeight, chunk_rows


def stack_loss_with_summary(
    model: MTPModel,
    final_BTC: Tensor,
    at: BranchPoint,
    batch: WindowBatch,
    targets: Sequence[DepthTarget],
) -> tuple[Tensor, Tensor]:
    """:func:`~mtp_lightning.objective.stack_loss.stack_loss` of a stack that is a
    :class:`~mtp_lightning.mtp.summary.Summary`.

    Args:
        model: the model.
        final_BTC: the trunk's output, and ...
        at: ... the branch point, both from :meth:`MTPModel.run_trunk`.
        batch: the windows, for the tokens ahead.
        targets: of the main prediction, and of depth 1 where that is computed; of the latter the
            coefficient alone is used.
    """
    main, *further = targets
    total, sums = one_state_loss(model.head.weight, final_BTC, [main])
    assert isinstance(model.mtp, Summary)
    for target in further:
        loss, own_sum = summary_loss(model.mtp, at.hidden, batch, target.coefficient)
        total, sums = total + loss, torch.cat((sums, own_sum.unsqueeze(0)))
    return total, sums


def future_of(head: Summary, batch: WindowBatch) -> Future:
    """What a head looks at."""
    return Future(
        batch.tokens,
        batch.seq_len,
        documents_BW=batch.documents,
        scored_BW=batch.scored,
        first=head.config.first_ahead,
        last=head.config.lookahead,
    )


def summary_loss(
    head: Summary, hidden_BTC: Tensor, batch: WindowBatch, coefficient: float
) -> tuple[Tensor, Tensor]:
    """The summed loss of a head over the positions that count.

    Args:
        head: whose matrix is trained.
        hidden_BTC: the trunk's state.
        batch: the windows.
        coefficient: its factor.

    Returns:
        ``coefficient * sum``, a differentiable scalar in fp32 (in a double precision model fp64),
        and the plain sum, fp64, without a gradient.
    """
    return _SummaryLoss.apply(
        hidden_BTC, head.head.weight, head, future_of(head, batch), coefficient
    )


@torch.no_grad()
def summary_values(head: Summary, hidden_BTC: Tensor, batch: WindowBatch) -> tuple[Tensor, Tensor]:
    """The loss of every position [B, T], in the weight's precision, whatever the autocast around,
    and which of them count, bool [B, T]."""
    weight_VC = head.head.weight
    with torch.autocast(weight_VC.device.type, enabled=False):
        h_BTC, future = hidden_BTC.to(weight_VC.dtype), future_of(head, batch)
        chunks = list(_chunks(head, h_BTC, weight_VC, future))
    shape = hidden_BTC.shape[:2]
    value_M = torch.cat([value_R for _, value_R, _, _ in chunks])
    valid_M = torch.cat([valid_R for _, _, valid_R, _ in chunks])
    return value_M.view(shape), valid_M.view(shape)


def _chunks(
    head: Summary, hidden: Tensor, weight_VC: Tensor, future: Future
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Place in M, loss, whether it counts, and derivative by the logits [R, V], of each chunk."""
    term = SummaryTerm.of_head(head)
    h_MC = hidden.detach().reshape(-1, hidden.shape[-1])
    # The places ahead of a chunk take as much memory as its logits, or less.
    rows = chunk_rows(max(weight_VC.shape[0], future.last), h_MC.device)
    for start in range(0, len(h_MC), rows):
        place = slice(start, min(start + rows, len(h_MC)))
        logits_RV = matmul_transposed(h_MC[place], weight_VC)
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        tokens_RS, counts_RS = future.rows(place)
        value_R, d_logits_RV = term.gradient(logits_RV, tokens_RS, counts_RS)
        del logits_RV
        yield place, value_R, counts_RS.any(-1), d_logits_RV
        del d_logits_RV


class _SummaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_VC: Tensor,
        head: Summary,
        future: Future,
        coefficient: float,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_head = HeadWeight(weight_VC, needs_gradient=needs_weight)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        h, weight = hidden.detach().to(dtype), weight_VC.detach().to(dtype)
        h_MC = h.reshape(-1, h.shape[-1])
        with torch.autocast(device, enabled=False):
            for place, value_R, valid_R, d_logits_RV in _chunks(head, h, weight, future):
                total += (value_R * valid_R).double().sum()
                # Mask and coefficient go onto the C-wide factors, not onto the V-wide one.
                scale_R1 = valid_R.to(dtype).mul_(coefficient).unsqueeze(-1)
                d_logits_RV = d_logits_RV.to(dtype)
                if d_hidden is not None:
                    d_h_RC = matmul_transposed(d_logits_RV, weight.t()) * scale_R1
                    d_hidden.view(-1, h.shape[-1])[place] = d_h_RC.to(d_hidden.dtype)
                if of_head.needs_gradient:
                    of_head.add(d_logits_RV, h_MC[place] * scale_R1)
        ctx.gradients = (d_hidden, of_head.gradient)
        ctx.mark_non_differentiable(total)
        return (total * coefficient).to(torch.promote_types(weight_VC.dtype, torch.float32)), total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        return *(None if d is None else d * grads[0] for d in gradients), None, None, None

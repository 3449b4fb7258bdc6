"""The objective: ``L = L_0 + sum_k lambda_k L_k`` (DeepSeek-V3, eq. 24-25).

``L_k`` is the mean over the valid targets of depth k in the whole optimizer step: every rank's,
every micro-batch's. A micro-batch therefore divides its sums by the step's counts, not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.mtp.base import Draw
from mtp_lightning.mtp.independent import IndependentMTP
from mtp_lightning.nn.moe import collecting_balance_losses
from mtp_lightning.objective.cross_entropy import DepthLoss, weighted_cross_entropy
from mtp_lightning.objective.head_by_head import head_by_head_loss
from mtp_lightning.objective.multi_target import multi_target_cross_entropy

if TYPE_CHECKING:
    from mtp_lightning.model import MTPModel


def active_depths(weights: Sequence[float]) -> list[int]:
    """The MTP depths (1 .. D) that count in a step: those whose weight is not 0."""
    return [k for k, weight in enumerate(weights, start=1) if weight != 0.0]


def mtp_loss(
    model: MTPModel,
    batch: WindowBatch,
    weights: Sequence[float],
    counts: Sequence[int],
    *,
    main: float = 1.0,
    draw: Draw | None = None,
    windows: int | None = None,
    sequence_losses: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One micro-batch's part of the step's loss.

    Heads that do not read each other are trained one after another, see ``head_by_head``: their
    backward passes have then happened when this returns, and ``backward()`` on the loss goes
    through the trunk and hands out all gradients.

    Args:
        model: the model.
        batch: the micro-batch.
        weights: lambda_k for k = 1 .. D. A depth of weight 0 is not computed.
        counts: valid targets of depths 0 .. D in the whole step.
        main: factor of L_0, which some ways of balancing the tasks move.
        draw: what a stack's random choices in training depend on; None makes none.
        windows: in the whole step, over which the experts' sequence-wise balance loss is a mean;
            None when this micro-batch is the step.
        sequence_losses: the parts of the experts' balance loss are appended to it, for the log;
            those of heads that are trained one after another with them.

    Returns:
        The part of ``L`` (the parts of all micro-batches and ranks add up to it), and the summed
        losses [D + 1] of this micro-batch, fp64, 0 for depths not computed.

    Raises:
        ValueError: the batch was built for another depth, or has no valid target.
    """
    assert len(weights) == model.depth and len(counts) == model.depth + 1
    if counts[0] == 0:
        raise ValueError(
            "The batch holds no valid target: every position crosses a document border. "
            "Use longer documents, or data.document_mask=false."
        )
    active = active_depths(weights)
    computed_depths = [0, *active]
    factors = [main, *weights]
    targets = [batch.targets(k) for k in computed_depths]
    coefficients = [factors[k] / max(counts[k], 1) for k in computed_depths]
    balance = 1 / (batch.batch_size if windows is None else windows)
    with collecting_balance_losses() as balance_losses:
        total, computed = _losses(model, batch, active, targets, coefficients, draw, balance)
    for loss in balance_losses:
        if loss.requires_grad:  # those of head_by_head have had their backward pass
            total = total + balance * loss
        if sequence_losses is not None:
            sequence_losses.append(balance * loss.detach())
    sums = computed.new_zeros(model.depth + 1)
    sums[computed_depths] = computed
    return total, sums


def _losses(
    model: MTPModel,
    batch: WindowBatch,
    active: Sequence[int],
    targets: Sequence[Tensor],
    coefficients: Sequence[float],
    draw: Draw | None,
    balance: float,
) -> tuple[Tensor, Tensor]:
    """The weighted total, and the plain sums of depth 0 and the ``active`` depths."""
    if active and model.mtp.shares_hidden:
        hidden = model.read(batch, active).final
        return multi_target_cross_entropy(model.head.weight, hidden, targets, coefficients)
    if active and isinstance(model.mtp, IndependentMTP):
        reading = model.read(batch, active)
        return head_by_head_loss(model, reading, active, targets, coefficients, balance=balance)
    return _joint_loss(model, batch, active, targets, coefficients, draw)


def _joint_loss(
    model: MTPModel,
    batch: WindowBatch,
    active: Sequence[int],
    targets: Sequence[Tensor],
    coefficients: Sequence[float],
    draw: Draw | None,
) -> tuple[Tensor, Tensor]:
    """All depths forward, then all depths through the head; any stack can be trained so."""
    hidden = model(batch, active, draw=draw)
    depths = [
        DepthLoss(
            hidden=hidden[k],
            targets=target,
            coefficient=coefficient,
            train_head=k == 0 or model.mtp.trains_head,
        )
        for k, target, coefficient in zip((0, *active), targets, coefficients, strict=True)
    ]
    return weighted_cross_entropy(model.head.weight, depths)

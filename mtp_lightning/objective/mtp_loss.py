"""The objective: ``L = L_0 + sum_k lambda_k L_k`` (DeepSeek-V3, eq. 24-25).

``L_k`` is the mean over the valid targets of depth k in the whole optimizer step: every rank's,
every micro-batch's. A micro-batch therefore divides its sums by the step's counts, not its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.objective.cross_entropy import DepthLoss, weighted_cross_entropy


def active_depths(weights: Sequence[float]) -> list[int]:
    """The MTP depths (1 .. D) that count in a step: those whose weight is not 0."""
    return [k for k, weight in enumerate(weights, start=1) if weight != 0.0]


def mtp_loss(
    model: MTPModel, batch: WindowBatch, weights: Sequence[float], counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """One micro-batch's part of the step's loss.

    Args:
        model: the model.
        batch: the micro-batch.
        weights: lambda_k for k = 1 .. D. A depth of weight 0 is not computed.
        counts: valid targets of depths 0 .. D in the whole step.

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
    hidden = model(batch, active)
    factors = [1.0, *weights]
    depths = [
        DepthLoss(
            hidden=hidden[k],
            targets=batch.targets(k),
            coefficient=factors[k] / max(counts[k], 1),
            train_head=k == 0 or model.mtp.trains_head,
        )
        for k in (0, *active)
    ]
    total, computed = weighted_cross_entropy(model.head.weight, depths)
    sums = computed.new_zeros(model.depth + 1)
    sums[[0, *active]] = computed
    return total, sums

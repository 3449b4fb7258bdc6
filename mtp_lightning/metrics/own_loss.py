"""Validation losses of depths that bring a loss of their own.

Shapes: B batch, T positions, C d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.rates import DepthRates, exact
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.mtp.feed import HeadWeight, Prediction
from mtp_lightning.objective.targets import DepthTarget
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.through_head import through_head


class OwnLossRates(DepthRates):
    """:class:`DepthRates` of the main prediction, and ``loss_depth_k`` of depths that bring a loss
    of their own: the mean over the positions that count. These depths have no other rates.

    Args:
        depth: D.
        text_bytes: as for :class:`DepthRates`.
    """

    own_count: Tensor
    own_loss: Tensor

    def __init__(self, depth: int, text_bytes: Sequence[int] | None = None) -> None:
        super().__init__(0, text_bytes)
        for name in ("own_count", "own_loss"):
            zeros = torch.zeros(depth, dtype=torch.float64)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, model: MTPModel, batch: WindowBatch, hidden: dict[int, Tensor]) -> None:
        """As :meth:`DepthRates.update`."""
        super().update(model, batch, hidden)
        for k in range(1, len(self.own_loss) + 1):
            value_BT, valid_BT = own_values(model.mtp, k, batch, hidden[k])
            self.own_count[k - 1] += valid_BT.sum()
            self.own_loss[k - 1] += exact(value_BT).where(valid_BT, 0).sum()

    def compute(self) -> dict[str, float]:
        """As :meth:`DepthRates.compute`, with ``loss_depth_k``."""
        means = (self.own_loss / self.own_count).tolist()
        losses = {f"loss_depth_{k}": loss for k, loss in enumerate(means, start=1)}
        return {**super().compute(), **losses}


@torch.no_grad()
def own_values(
    stack: MTPStack, k: int, batch: WindowBatch, hidden_BTC: Tensor
) -> tuple[Tensor, Tensor]:
    """Depth ``k``'s own loss at every position [B, T], in the weight's precision whatever the
    autocast around, and which positions count, bool [B, T]."""
    loss = stack.own_loss(k, batch)
    assert loss is not None
    weight = loss.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    values_BT = torch.empty(hidden_BTC.shape[:2], dtype=dtype, device=hidden_BTC.device)
    # The target's tokens and term are not read: the depth's own loss replaces them.
    target = DepthTarget(k, batch.targets(0), 1.0, CrossEntropy(), record=values_BT)
    hidden_BTC = hidden_BTC.to(weight.dtype)
    prediction = Prediction(hidden_BTC, [target], train_head=False, needs_gradient=False, loss=loss)
    with torch.autocast(weight.device.type, enabled=False):
        through_head(HeadWeight(weight), [prediction])
    return values_BT, loss.valid_BT

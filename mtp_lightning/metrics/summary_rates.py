"""The rates of any model's stack, including one that summarizes the tokens ahead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.rates import DepthRates, exact
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.summary import Summary
from mtp_lightning.objective.summary_loss import summary_values


def rates_of(model: MTPModel, text_bytes: Sequence[int] | None = None) -> DepthRates:
    """The validation metric of a model.

    Args:
        model: any model.
        text_bytes: evaluated UTF-8 bytes of every document of the text.
    """
    if isinstance(model.mtp, Summary):
        return SummaryRates(model.mtp, text_bytes)
    return DepthRates(model.token_depth, text_bytes)


class SummaryRates(DepthRates):
    """:class:`DepthRates` of the main prediction, and ``loss_depth_1``, the loss of a head that
    summarizes the tokens ahead: its mean over the positions with a valid token ahead. Such a head
    has no other rates.

    Args:
        head: the head.
        text_bytes: as for :class:`DepthRates`.
    """

    summary_count: Tensor
    summary_loss: Tensor

    def __init__(self, head: Summary, text_bytes: Sequence[int] | None = None) -> None:
        super().__init__(0, text_bytes)
        self._values = lambda hidden, batch: summary_values(head, hidden, batch)
        for name in ("summary_count", "summary_loss"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, default=zero, dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, hidden: dict[int, Tensor], weight_VC: Tensor, batch: WindowBatch) -> None:
        """See :meth:`DepthRates.update`."""
        super().update(hidden, weight_VC, batch)
        value_BT, valid_BT = self._values(hidden[1], batch)
        self.summary_count += valid_BT.sum()
        self.summary_loss += exact(value_BT).where(valid_BT, 0).sum()

    def compute(self) -> dict[str, float]:
        """:meth:`DepthRates.compute` with ``loss_depth_1``."""
        loss = float(self.summary_loss / self.summary_count)
        return {**super().compute(), "loss_depth_1": loss}

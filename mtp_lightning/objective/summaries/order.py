"""How soon each id comes: ListNet's loss with the distances' softmax (arXiv 2508.19228, section 3).

Shapes: R positions of one chunk, V vocabulary, S places ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_lightning.mtp.top import TopMTP
from mtp_lightning.objective.summaries.base import SummaryTerm


class Order(SummaryTerm, of=TopMTP):
    """``-sum_v softmax(-d / tau)_v log softmax(logits)_v``, d the distance to the next v."""

    head: TopMTP

    def gradient(
        self, logits_RV: Tensor, tokens_RS: Tensor, counts_RS: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The target has mass on S ids at most, and so no row of V.
        distance_S = torch.arange(
            tokens_RS.shape[1], device=logits_RV.device, dtype=logits_RV.dtype
        )
        score_RS = (-distance_S / self.head.config.tau).masked_fill(~counts_RS, -torch.inf)
        target_RS = torch.softmax(score_RS, dim=-1).nan_to_num(nan=0.0)  # a row without any
        log_probs_RV = torch.log_softmax(logits_RV, dim=-1)
        value_R = -(target_RS * log_probs_RV.gather(1, tokens_RS)).sum(-1)
        return value_R, log_probs_RV.exp_().scatter_add_(1, tokens_RS, -target_RS)

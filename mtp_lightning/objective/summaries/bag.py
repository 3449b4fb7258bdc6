"""Which ids come: weighted binary cross-entropy with a multi-hot target (arXiv 2510.14751, section
3).

Shapes: R positions of one chunk, V vocabulary, S places ahead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.mtp.bag import BagMTP
from mtp_lightning.objective.summaries.base import SummaryTerm


class Bag(SummaryTerm, of=BagMTP):
    """``-sum_v w_v [a_v log sigmoid(z_v) + (1 - a_v) log(1 - sigmoid(z_v))]``."""

    head: BagMTP

    def gradient(
        self, logits_RV: Tensor, tokens_RS: Tensor, counts_RS: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights_V = self.head.weights_V.to(logits_RV.dtype)
        # -log(1 - sigmoid(z)) = softplus(z), and -log sigmoid(z) = softplus(z) - z.
        hit_RS = weights_V[tokens_RS] * counts_RS
        value_R = F.softplus(logits_RV) @ weights_V
        value_R -= (hit_RS * logits_RV.gather(1, tokens_RS)).sum(-1)
        d_logits_RV = torch.sigmoid(logits_RV).mul_(weights_V)
        return value_R, d_logits_RV.scatter_add_(1, tokens_RS, -hit_RS)

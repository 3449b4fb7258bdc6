"""Token Order Prediction (Zuhri et al. 2025, arXiv 2508.19228, section 3).

A second unembedding U2 ranks the vocabulary by how soon each id comes next. With ``d(v)`` the
tokens between position i and the next occurrence of v, 0 for the very next token, among the W
tokens ahead:

    L_top = -sum_v softmax(-d / tau)_v log softmax(U2 h_i)_v

The target is a distribution over ids: one that does not occur within W has no mass, an id that
occurs several times has that of its nearest occurrence. (The paper's scores are ``W - d``, which
is the same softmax, and its tau is 1: mass 0.63, 0.23, 0.09, .. on the next tokens, if they are
different ones, and with that nothing beyond about a hundred that float32 could tell from 0.) The
scores are made in float32: float16 cannot tell distances beyond 2,048 apart.

Documents, tasks and the window's end: see ``look_ahead.py``. Windows hold the W tokens ahead of
every position, of a W beyond T + 1 as many as T + 1 beyond the last position: distances are then
cut where the window ends. A position without a token that counts does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.mtp.summary import Summary, SummaryConfig, SummaryLoss
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.settings import require_number


@dataclass(frozen=True, kw_only=True)
class TopConfig(SummaryConfig, variant="top"):
    """``mtp=top``: the order of the tokens ahead, in one further loss.

    Attributes:
        lookahead: W, tokens ahead that are ranked.
        tau: temperature of the target: the larger, the more it spreads over distances.

    Raises:
        UserError: tau is not above 0.
    """

    lookahead: int = 256
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("mtp.tau", self.tau, above=0)

    def build(self, trunk: TrunkConfig) -> TopMTP:
        return TopMTP(self, trunk)


class TopMTP(Summary):
    """The second unembedding."""

    config: TopConfig

    def own_loss(self, k: int, batch: WindowBatch) -> Order:
        return Order(self, batch)


class Order(SummaryLoss):
    """ListNet's loss with the distances' softmax: ``-sum_v softmax(-d / tau)_v log
    softmax(logits)_v``."""

    head: TopMTP

    def of_ahead(
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

"""Token Order Prediction (Zuhri et al. 2025, arXiv 2508.19228, section 3).

A second unembedding U2 ranks the vocabulary by how soon each id comes next. With ``d(v)`` the
tokens between position i and the next occurrence of v, 0 for the very next token, among the W
tokens ahead:

    L_top = -sum_v softmax(-d / tau)_v log softmax(U2 h_i)_v

The target is a distribution over ids: an id that does not occur within W has no mass, and one that
occurs several times has the mass of its nearest occurrence. (The paper's scores ``W - d`` give the
same softmax, with tau = 1: mass 0.63, 0.23, 0.09, .. on the next tokens, if they differ. Beyond
about a hundred tokens that is 0 in float32.) Scores are computed in float32, since float16 does not
distinguish distances beyond 2,048.

See ``summary.py`` for documents, tasks and the window's end. Windows hold the W tokens ahead of
every position, but at most T + 1 tokens beyond the last one; with a larger W, positions see up to
the window's end. A position without any token that counts does not count.
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
    """``mtp=top``: one further loss, on the order of the tokens ahead.

    Attributes:
        lookahead: W, the number of tokens ahead that are ranked.
        tau: temperature of the target; larger values spread it over larger distances.

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

    def own_loss(self, k: int, batch: WindowBatch) -> OrderLoss:
        return OrderLoss(self, batch)


class OrderLoss(SummaryLoss):
    """ListNet's loss with the distances' softmax: ``-sum_v softmax(-d / tau)_v log
    softmax(logits)_v``."""

    head: TopMTP

    def gradient(self, rows: slice, logits_RV: Tensor) -> tuple[Tensor, Tensor]:
        tokens_RS, counts_RS = self.ahead.rows(rows)
        # The target has mass on at most S ids, so it is never stored as a row of V numbers.
        distance_S = torch.arange(
            tokens_RS.shape[1], device=logits_RV.device, dtype=logits_RV.dtype
        )
        score_RS = (-distance_S / self.head.config.tau).masked_fill(~counts_RS, -torch.inf)
        target_RS = torch.softmax(score_RS, dim=-1).nan_to_num(nan=0.0)  # NaN: nothing counts
        log_probs_RV = torch.log_softmax(logits_RV, dim=-1)
        value_R = -(target_RS * log_probs_RV.gather(1, tokens_RS)).sum(-1)
        return value_R, log_probs_RV.exp_().scatter_add_(1, tokens_RS, -target_RS)

"""A bag of the tokens ahead: future summary prediction, handcrafted (Mahajan et al. 2025, arXiv
2510.14751, section 3).

One head U2 predicts for every id whether it is among ``x_{t+2} .. x_{t+tau}`` (the next token is
left to the main prediction):

    L_bag = -sum_v w_v [a_v log sigmoid(z_v) + (1 - a_v) log(1 - sigmoid(z_v))],    z = U2 h_t

with ``a_v`` = 1 for ids of the bag. The loss is a sum over the vocabulary, in nats per bag: it
starts at ``V ln 2`` and soon consists mostly of the ids that do occur. The weights are inverse
document frequencies, ``w_v = ln((1 + N) / (1 + n_v)) + 1`` for an id that occurs in n_v of the N
training documents (the smoothed form, which is never 0, and is 1 for a corpus of one document), or
all 1.

See ``summary.py`` for documents, tasks and the window's end. A position whose bag is empty does
not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.summary import Summary, SummaryConfig, SummaryLoss
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.settings import require_choice

Weights = Literal["idf", "none"]


@dataclass(frozen=True, kw_only=True)
class BagConfig(SummaryConfig, variant="bag"):
    """``mtp=bag``: one further loss, on which ids occur among the tokens ahead.

    Attributes:
        lookahead: tau, how far ahead the last token of the bag is.
        weights: weights of the ids: ``idf``, counted in the training documents, or ``none``, all 1.

    Raises:
        UserError: the look-ahead leaves no bag, or the weighting is unknown.
    """

    meaning: ClassVar[tuple[str, ...]] = ("weights",)
    first_ahead: ClassVar[int] = 2

    lookahead: int = 12
    weights: Weights = "idf"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("mtp.weights", self.weights, get_args(Weights))

    def build(self, trunk: TrunkConfig) -> BagMTP:
        return BagMTP(self, trunk)


class BagMTP(Summary):
    """The head, and the weights of the ids. These are stored in checkpoints, so that a run that
    starts from the head of another run keeps its weights."""

    config: BagConfig
    weights_V: Tensor

    def __init__(self, config: BagConfig, trunk: TrunkConfig) -> None:
        super().__init__(config, trunk)
        self.register_buffer("weights_V", torch.ones(trunk.vocab_size))

    def observe_training_text(self, data: Any) -> None:
        """Set the weights of ``weights=idf`` by counting documents."""
        if self.config.weights != "idf":
            return
        text = data.training_text
        if text is None:
            raise UserError(
                "mtp.weights=idf counts the documents of a text, and a task has no documents: set "
                "mtp.weights=none."
            )
        holding_V = torch.from_numpy(text.document_frequency(len(self.weights_V)))
        self.weights_V.copy_(((1 + text.n_documents) / (1 + holding_V.double())).log() + 1)

    def own_loss(self, k: int, batch: WindowBatch) -> PresenceLoss:
        return PresenceLoss(self, batch)


class PresenceLoss(SummaryLoss):
    """``-sum_v w_v [a_v log sigmoid(z_v) + (1 - a_v) log(1 - sigmoid(z_v))]``."""

    head: BagMTP

    def gradient(self, rows: slice, logits_RV: Tensor) -> tuple[Tensor, Tensor]:
        tokens_RS, counts_RS = self.ahead.rows(rows)
        weights_V = self.head.weights_V.to(logits_RV.dtype)
        # -log(1 - sigmoid(z)) = softplus(z), and -log sigmoid(z) = softplus(z) - z.
        hit_RS = weights_V[tokens_RS] * counts_RS
        value_R = F.softplus(logits_RV) @ weights_V
        value_R -= (hit_RS * logits_RV.gather(1, tokens_RS)).sum(-1)
        d_logits_RV = torch.sigmoid(logits_RV).mul_(weights_V)
        return value_R, d_logits_RV.scatter_add_(1, tokens_RS, -hit_RS)

"""Cross-entropy with the target token: ``-log q(x)``."""

from __future__ import annotations

from torch import Tensor

from mtp_lightning.nn.ops import exp_
from mtp_lightning.objective.terms.base import Chunk, Term


class CrossEntropy(Term):
    """``objective=ce``; always the term of the main prediction."""

    name = "ce"
    of_token = True

    def value(self, chunk: Chunk) -> Tensor:
        return -chunk.log_probs_RV.gather(1, chunk.targets_R.unsqueeze(-1)).squeeze(-1)

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        # softmax - one_hot, written over the log-probabilities.
        value_R = self.value(chunk)
        target_R1 = chunk.targets_R.unsqueeze(-1)
        d_logits_RV = exp_(chunk.log_probs_RV)
        minus_one = d_logits_RV.new_full((1, 1), -1.0)
        d_logits_RV.scatter_add_(1, target_R1, minus_one.expand_as(target_R1))
        return value_R, d_logits_RV

"""The reverse divergence: the depth avoids tokens that the main prediction finds improbable."""

from __future__ import annotations

from torch import Tensor

from mtp_lightning.objective.terms.base import Chunk, Term


class ReverseKL(Term):
    """``objective=reverse_kl``: ``KL(q^k_t || sg p_{t+k})``, which seeks one mode where
    ``objective=kl`` covers all (MiniLLM, arXiv 2306.08543)."""

    name = "reverse_kl"
    needs_teacher = True

    def value(self, chunk: Chunk) -> Tensor:
        ratio_RV = chunk.log_probs_RV - chunk.teacher.log_probs_RV
        return (chunk.log_probs_RV.exp() * ratio_RV).sum(-1)

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        # q_j (log q_j - log p_j - KL), written over the log-probabilities.
        ratio_RV = chunk.log_probs_RV - chunk.teacher.log_probs_RV
        q_RV = chunk.log_probs_RV.exp_()
        value_R = (q_RV * ratio_RV).sum(-1)
        return value_R, q_RV.mul_(ratio_RV.sub_(value_R.unsqueeze(-1)))

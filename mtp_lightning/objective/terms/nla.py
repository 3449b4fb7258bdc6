"""The negative logarithm of the expected acceptance (LK losses, arXiv 2602.23881)."""

from __future__ import annotations

from torch import Tensor

from mtp_lightning.objective.terms.base import Chunk, Term
from mtp_lightning.objective.terms.tv import acceptance, tv_gradient

_FLOOR = 1e-5


class NLA(Term):
    """``objective=nla``: ``-log max(alpha, 1e-5)``, ``alpha = sum_v min(sg p_v, q_v)``.

    It generalizes cross-entropy from one token to all tokens that the main prediction finds
    probable: the two are equal if p is one-hot. Below the floor the gradient is 0.
    """

    name = "nla"
    needs_teacher = True

    def value(self, chunk: Chunk) -> Tensor:
        alpha_R = acceptance(chunk.teacher.probs_RV, chunk.log_probs_RV.exp())
        return -alpha_R.clamp(min=_FLOOR).log()

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        p_RV, q_RV = chunk.teacher.probs_RV, chunk.log_probs_RV.exp_()
        alpha_R = acceptance(p_RV, q_RV)
        inverse_R = (alpha_R > _FLOOR) / alpha_R.clamp(min=_FLOOR)
        d_logits_RV = tv_gradient(p_RV, q_RV).mul_(inverse_R.unsqueeze(-1))
        return -alpha_R.clamp(min=_FLOOR).log(), d_logits_RV

"""A blend from the KL divergence to the acceptance as the depth improves (LK losses, arXiv
2602.23881)."""

from __future__ import annotations

from torch import Tensor

from mtp_lightning.objective.terms.base import Chunk, Term
from mtp_lightning.objective.terms.kl import divergence
from mtp_lightning.objective.terms.tv import acceptance, tv_gradient
from mtp_lightning.settings import require_number


class LK(Term):
    """``objective=lk``: ``w KL(sg p || q) + (1 - w) TV(sg p, q)``, with ``w = exp(-rate sg alpha)``
    at every position.

    Args:
        rate: how quickly the weight of the divergence falls with the acceptance.

    Raises:
        UserError: the rate is negative.
    """

    name = "lk"
    needs_teacher = True

    def __init__(self, rate: float = 3.0) -> None:
        self.rate = require_number("objective.rate", rate, least=0)

    def value(self, chunk: Chunk) -> Tensor:
        alpha_R = acceptance(chunk.teacher.probs_RV, chunk.log_probs_RV.exp())
        w_R = (-self.rate * alpha_R.detach()).exp()
        return w_R * divergence(chunk) + (1 - w_R) * (1 - alpha_R)

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        kl_R = divergence(chunk)
        p_RV, q_RV = chunk.teacher.probs_RV, chunk.log_probs_RV.exp_()
        alpha_R = acceptance(p_RV, q_RV)
        w_R = (-self.rate * alpha_R).exp()
        w_R1 = w_R.unsqueeze(-1)
        d_logits_RV = (q_RV - p_RV).mul_(w_R1)  # of the divergence
        d_logits_RV.add_(tv_gradient(p_RV, q_RV).mul_(1 - w_R1))
        return w_R * kl_R + (1 - w_R) * (1 - alpha_R), d_logits_RV

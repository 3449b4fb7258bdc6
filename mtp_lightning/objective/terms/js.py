"""The Jensen-Shannon divergence: both distributions are compared with their mean (Lin 1991)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtp_lightning.objective.terms.base import Chunk, Term


class JS(Term):
    """``objective=js``: ``(KL(sg p || m) + KL(q || m)) / 2`` with ``m = (sg p + q) / 2``; at most
    ln 2."""

    name = "js"
    needs_teacher = True

    def value(self, chunk: Chunk) -> Tensor:
        log_p_RV, log_q_RV = chunk.teacher.log_probs_RV, chunk.log_probs_RV
        log_m_RV = torch.logaddexp(log_p_RV, log_q_RV) - math.log(2)
        kl_p_R = (chunk.teacher.probs_RV * (log_p_RV - log_m_RV)).sum(-1)
        return 0.5 * (kl_p_R + (log_q_RV.exp() * (log_q_RV - log_m_RV)).sum(-1))

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        # q_j (log q_j - log m_j - KL(q || m)) / 2, written over the log-probabilities.
        log_p_RV, log_q_RV = chunk.teacher.log_probs_RV, chunk.log_probs_RV
        log_m_RV = torch.logaddexp(log_p_RV, log_q_RV).sub_(math.log(2))
        ratio_RV = log_q_RV - log_m_RV
        kl_p_R = log_m_RV.neg_().add_(log_p_RV).mul_(chunk.teacher.probs_RV).sum(-1)
        q_RV = log_q_RV.exp_()
        kl_q_R = (q_RV * ratio_RV).sum(-1)
        d_logits_RV = q_RV.mul_(ratio_RV.sub_(kl_q_R.unsqueeze(-1))).mul_(0.5)
        return 0.5 * (kl_p_R + kl_q_R), d_logits_RV

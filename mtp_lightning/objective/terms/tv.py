"""Total variation: the probability that a draft sampled from the depth is rejected.

With ``alpha = sum_v min(p_v, q_v)``, the expected acceptance of speculative sampling (Leviathan et
al. 2023, theorem 3.5), the loss is ``1 - alpha`` (arXiv 2606.12370, eq. 10).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_lightning.objective.terms.base import Chunk, Term


class TV(Term):
    """``objective=tv``: ``1 - sum_v min(sg p_v, q_v)``."""

    name = "tv"
    needs_teacher = True

    def value(self, chunk: Chunk) -> Tensor:
        return 1 - acceptance(chunk.teacher.probs_RV, chunk.log_probs_RV.exp())

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        p_RV, q_RV = chunk.teacher.probs_RV, chunk.log_probs_RV.exp_()
        return 1 - acceptance(p_RV, q_RV), tv_gradient(p_RV, q_RV)


def acceptance(p_RV: Tensor, q_RV: Tensor) -> Tensor:
    """``alpha`` of every position [R]."""
    return torch.minimum(p_RV, q_RV).sum(-1)


def tv_gradient(p_RV: Tensor, q_RV: Tensor) -> Tensor:
    """The gradient of ``1 - alpha`` with respect to the logits of ``q`` (eq. 11), written over
    ``q``: ``-q_j ([q_j <= p_j] - S)``, ``S = sum_v [q_v <= p_v] q_v``."""
    below_RV = torch.where(q_RV <= p_RV, q_RV, 0)
    return q_RV.mul_(below_RV.sum(-1, keepdim=True)).sub_(below_RV)

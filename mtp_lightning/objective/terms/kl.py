"""Self-distillation: the depth learns the main prediction's distribution of the same token.

Used by FastMTP (arXiv 2509.18362) and by the soft-target heads of reinforcement learning trainers;
the divergence is that of Hinton et al. 2015 (arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mtp_lightning.objective.terms.base import Chunk, Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.settings import require_number


class KL(Term):
    """``objective=kl``: ``beta KL(sg p_{t+k} || q^k_t) + (1 - beta) CE``.

    Args:
        temperature: divides the logits of both distributions before their softmax. Unlike in Hinton
            et al., the loss is not multiplied by its square; use ``mtp_lambda`` to scale it.
        beta: weight of the divergence; the rest is cross-entropy with the text, at temperature 1.

    Raises:
        UserError: the temperature is not above 0, or beta is outside of (0, 1].
    """

    name = "kl"
    needs_teacher = True

    def __init__(self, temperature: float = 1.0, beta: float = 1.0) -> None:
        self.temperature = require_number("objective.temperature", temperature, above=0)
        self.beta = require_number("objective.beta (0 is objective=ce)", beta, above=0, most=1)

    def value(self, chunk: Chunk) -> Tensor:
        return divergence(chunk.tempered(self.temperature))

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        # (q - p) / temperature, written over the log-probabilities.
        chunk = chunk.tempered(self.temperature)
        value_R = divergence(chunk)
        d_logits_RV = chunk.log_probs_RV.exp_().sub_(chunk.teacher.probs_RV)
        return value_R, d_logits_RV if self.temperature == 1 else d_logits_RV / self.temperature

    def parts(self) -> Iterator[tuple[float, Term]]:
        yield self.beta, self
        if self.beta < 1:
            yield 1 - self.beta, CrossEntropy()


def divergence(chunk: Chunk) -> Tensor:
    """``KL(sg p || q)`` of every position [R], in nats."""
    log_p_RV, p_RV = chunk.teacher.log_probs_RV, chunk.teacher.probs_RV
    return (log_p_RV - chunk.log_probs_RV).mul_(p_RV).sum(-1)

"""Expected accepted length under greedy decoding (arXiv 2609.24150).

    -sum_{k=1..D} prod_{i<=k} q^i_t(a_i),    a_i = argmax_v sg p_{t+i,v}, the lowest id among equals

Greedy verification accepts draft i if it is ``a_i``, the token that the main prediction puts first.
A draft sampled from ``q^i`` is that token with probability ``q^i(a_i)``, so the sum is the expected
number of accepted drafts. The loss of depth k is ``1 - prod_{i<=k} q^i_t(a_i)``: it has the same
gradient as the formula, and it is never negative, on which balance rules rely.
"""

from __future__ import annotations

from torch import Tensor

from mtp_lightning.nn.ops import exp_
from mtp_lightning.objective.terms.base import Chunk
from mtp_lightning.objective.terms.coupled import Coupled


class EAL(Coupled):
    """``objective=eal``. A draft is accepted with probability ``q(a)``."""

    name = "eal"

    def accepted(self, chunk: Chunk) -> Tensor:
        return chunk.log_probs_RV.gather(1, _greedy(chunk)).squeeze(-1).exp()

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        # -q_a ([j = a] - q_j), in the place of the log-probabilities.
        best_R1 = _greedy(chunk)
        accepted_R1 = chunk.log_probs_RV.gather(1, best_R1).exp()
        d_logits_RV = exp_(chunk.log_probs_RV).mul_(accepted_R1)
        return 1 - accepted_R1.squeeze(-1), d_logits_RV.scatter_add_(1, best_R1, -accepted_R1)


def _greedy(chunk: Chunk) -> Tensor:
    """The token [R, 1] of greedy decoding; ``argmax`` returns the lowest id among equals."""
    return chunk.teacher.log_probs_RV.argmax(dim=-1, keepdim=True)

"""The share of D drafts that speculative sampling rejects (arXiv 2606.12370, eq. 13).

    1 - (1/D) sum_{j=1..D} prod_{i<=j} alpha_i,    alpha_i = sum_v min(sg p_{t+i,v}, q^i_{t,v})

It is the mean over j of ``1 - prod_{i<=j} alpha_i``, the loss of depth j.
"""

from __future__ import annotations

from torch import Tensor

from mtp_lightning.objective.terms.base import Chunk
from mtp_lightning.objective.terms.coupled import Coupled
from mtp_lightning.objective.terms.tv import TV, acceptance


class E2ETV(Coupled, TV):
    """``objective=e2e_tv``. A draft is accepted with probability alpha."""

    name = "e2e_tv"

    def accepted(self, chunk: Chunk) -> Tensor:
        return acceptance(chunk.teacher.probs_RV, chunk.log_probs_RV.exp())

"""The share of D drafts that sampling at a temperature rejects.

It is ``objective=e2e_tv`` (arXiv 2606.12370, eq. 13) of ``softmax(logits / temperature)``, the
distributions that decoding compares: at a temperature below 1, both put more weight on their
likeliest tokens, and so does the loss.
"""

from __future__ import annotations

from torch import Tensor

from mtp_lightning.objective.terms.base import Chunk
from mtp_lightning.objective.terms.e2e_tv import E2ETV
from mtp_lightning.settings import require_number


class WTV(E2ETV):
    """``objective=wtv``: ``e2e_tv`` at the temperature of decoding.

    Args:
        temperature: the sampling temperature of decoding; 1 is ``e2e_tv``. Temperature 0 is greedy
            decoding, which ``objective=eal`` is for.

    Raises:
        UserError: a temperature that is not above 0.
    """

    name = "wtv"

    def __init__(self, temperature: float = 1.0) -> None:
        key = "objective.temperature (greedy decoding is objective=eal)"
        self.temperature = require_number(key, temperature, above=0)

    def accepted(self, chunk: Chunk) -> Tensor:
        return super().accepted(chunk.tempered(self.temperature))

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        value_R, d_scaled_RV = super().gradient(chunk.tempered(self.temperature))
        return value_R, d_scaled_RV / self.temperature

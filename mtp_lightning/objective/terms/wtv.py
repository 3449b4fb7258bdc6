"""The share of D drafts that sampling at a temperature rejects.

It is ``objective=e2e_tv`` (arXiv 2606.12370, eq. 13) of ``softmax(logits / temperature)``, the
distributions that decoding compares: at a temperature below 1, both put more weight on their
likeliest tokens, and so does the loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mtp_lightning.objective.terms.base import Chunk, Teacher
from mtp_lightning.objective.terms.e2e_tv import E2ETV
from mtp_lightning.settings import require_number


class WTV(E2ETV):
    """``objective=wtv``: ``e2e_tv`` at the temperature of decoding.

    Args:
        temperature: the one that texts will be sampled at; 1 is ``e2e_tv``. Temperature 0 is greedy
            decoding, which ``objective=eal`` is for.

    Raises:
        UserError: a temperature that is not above 0.
    """

    name = "wtv"

    def __init__(self, temperature: float = 1.0) -> None:
        key = "objective.temperature (greedy decoding is objective=eal)"
        self.temperature = require_number(key, temperature, above=0)

    def accepted(self, chunk: Chunk) -> Tensor:
        return super().accepted(self._tempered(chunk))

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        value_R, d_scaled_RV = super().gradient(self._tempered(chunk))
        return value_R, d_scaled_RV / self.temperature

    def _tempered(self, chunk: Chunk) -> Chunk:
        """The chunk with both distributions at the temperature."""
        log_q_RV = torch.log_softmax(chunk.log_probs_RV / self.temperature, dim=-1)
        log_p_RV = torch.log_softmax(chunk.teacher.log_probs_RV / self.temperature, dim=-1)
        return replace(
            chunk, log_probs_RV=log_q_RV, main=Teacher(log_p_RV, chunk.teacher.hidden_RC)
        )

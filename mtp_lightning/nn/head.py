"""The output head that every prediction depth shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_lightning.nn.mixture import mixed_log_probs
from mtp_lightning.nn.ops import linear


class Head(nn.Module):
    """``logits = hidden @ weight.T``; a tied head is given the embedding's parameter."""

    def __init__(self, vocab_size: int, d_model: int, *, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model)) if tied is None else tied

    def forward(self, h_BTC: Tensor) -> Tensor:
        """[..., C] -> logits [..., V]; of a mixture [..., X] (``mixture.py``) log-probabilities.
        Training never calls it: see objective/through_head.py."""
        d_model = self.weight.shape[1]
        if h_BTC.shape[-1] == d_model:
            return linear(h_BTC, self.weight)
        return mixed_log_probs(h_BTC, d_model, self.log_probs)

    def log_probs(self, h_BTC: Tensor) -> Tensor:
        """[..., C] -> log-probabilities [..., V], fp32, of a double precision model fp64."""
        logits = linear(h_BTC.to(self.weight.dtype), self.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

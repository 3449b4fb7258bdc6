"""The output head that every prediction depth shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_lightning.nn.batch_invariant import by_row
from mtp_lightning.nn.mixture_of_softmaxes import mixed_log_probs
from mtp_lightning.nn.ops import linear, log_softmax_, matmul_transposed


class Head(nn.Module):
    """``logits = hidden @ weight.T``; the weight [V, C] is new, or that of another module, such as
    the embedding (``tied``)."""

    weight: Tensor

    def __init__(self, vocab_size: int, d_model: int, *, tied: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model)) if tied is None else tied

    def forward(self, h_BTC: Tensor) -> Tensor:
        """Logits [..., V] of states [..., C]; for a packed mixture of softmaxes [..., X],
        log-probabilities. Training goes through ``objective/through_head.py`` instead."""
        d_model = self.weight.shape[1]
        if h_BTC.shape[-1] == d_model:
            return linear(h_BTC, self.weight)
        return by_row(lambda h: mixed_log_probs(h, d_model, self.differentiable_log_probs), h_BTC)

    def log_probs(self, h_RC: Tensor) -> Tensor:
        """Log-probabilities of all tokens [R, V] of one chunk, as :func:`log_probs`."""
        return log_probs(h_RC, self.weight)

    def differentiable_log_probs(self, h_BTC: Tensor) -> Tensor:
        """Log-probabilities [..., V] of states [..., C], in at least fp32, with autograd."""
        logits = linear(h_BTC.to(self.weight.dtype), self.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def log_probs(h_RC: Tensor, weight_VC: Tensor) -> Tensor:
    """``log_softmax(h @ weight.T)`` [R, V] of one chunk, in at least fp32, without autograd; for a
    packed mixture of softmaxes, the mixture's."""
    d_model = weight_VC.shape[1]
    if h_RC.shape[1] != d_model:
        return mixed_log_probs(h_RC, d_model, lambda h: log_probs(h, weight_VC))
    logits_RV = matmul_transposed(h_RC, weight_VC)
    dtype = torch.promote_types(logits_RV.dtype, torch.float32)
    return log_softmax_(logits_RV, dtype)

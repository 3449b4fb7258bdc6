"""Softmax over a vocabulary, in the place of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_lightning.nn.kernels import native


def log_softmax_(logits_RV: Tensor, dtype: torch.dtype) -> Tensor:
    """``log_softmax(logits)`` [R, V] in ``dtype``; the logits may be overwritten."""
    if dtype == torch.float32 and native.fits(logits_RV) and logits_RV.is_contiguous():
        native.lib().log_softmax(logits_RV.data_ptr(), *logits_RV.shape)
        return logits_RV
    return torch.log_softmax(logits_RV, dim=-1, dtype=dtype)


def exp_(x: Tensor) -> Tensor:
    """``x.exp_()``, of log-probabilities."""
    if native.fits(x) and x.is_contiguous():
        native.lib().exponential(x.data_ptr(), x.numel())
        return x
    return x.exp_()

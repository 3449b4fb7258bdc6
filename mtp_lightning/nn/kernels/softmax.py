"""Softmax over a vocabulary, in the place of the logits, and cross-entropy as one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable

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


def cross_entropy(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """``-log softmax(logits)[target]`` [R], at least in fp32, and its gradient by the logits
    [R, V], ``softmax - one_hot``, in their precision.

    Compiled, for a GPU: what lies between is never written, where the log-probabilities in fp32, in
    the place of half-precision logits, were written and read twice.

    Args:
        logits_RV: of R positions.
        targets_R: token ids.
    """
    return _compiled()(logits_RV, targets_R)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_cross_entropy)


def _cross_entropy(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits_RV.dtype, torch.float32)
    log_probs_RV = torch.log_softmax(logits_RV, dim=-1, dtype=dtype)
    target_R1 = targets_R.unsqueeze(-1)
    tokens_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    d_logits_RV = log_probs_RV.exp() - (tokens_V == target_R1).to(dtype)
    return -log_probs_RV.gather(1, target_R1).squeeze(-1), d_logits_RV.to(logits_RV.dtype)

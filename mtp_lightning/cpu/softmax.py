"""Softmax over a vocabulary, written over the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_lightning.cpu import library as native
from mtp_lightning.nn import ops


def log_softmax_(logits_RV: Tensor, dtype: torch.dtype) -> Tensor:
    """``ops.log_softmax_``."""
    if dtype == torch.float32 and native.fits(logits_RV) and logits_RV.is_contiguous():
        native.lib().log_softmax(logits_RV.data_ptr(), *logits_RV.shape)
        return logits_RV
    return ops.log_softmax_.plain(logits_RV, dtype)


def exp_(x: Tensor) -> Tensor:
    """``ops.exp_``, of log-probabilities."""
    if native.fits(x) and x.is_contiguous():
        native.lib().exponential(x.data_ptr(), x.numel())
        return x
    return x.exp_()


ops.log_softmax_.register("cpu", log_softmax_)
ops.exp_.register("cpu", exp_)

"""Cross-entropy and its gradient by the logits as one compiled kernel, for a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def cross_entropy(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """``-log softmax(logits)[target]`` [R], at least in fp32, and its gradient by the logits
    [R, V], ``softmax - one_hot``, in their precision.

    Compiled, nothing between the two is written: uncompiled, the log-probabilities of
    half-precision logits would be written in fp32 and read twice.

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

"""Sampling on a CPU: each distribution over the vocabulary is read once, where PyTorch's operators
read and write several of its size (``cpp/sampling.cpp``).

Shapes: B rows, M drafts, V vocabulary, N tokens that drafts are chosen from, T = M + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_lightning.cpu import library as native
from mtp_lightning.decoding import sampling, verification


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """``sampling.draw``."""
    if not (native.fits(probs) and probs.is_contiguous()):
        return sampling.draw.plain(probs, uniform)
    tokens = torch.empty(probs.shape[:-1], dtype=torch.long)
    noise = uniform.double().contiguous()
    native.call("draw_tokens", probs, noise, tokens, tokens.numel(), probs.shape[-1])
    return tokens


def accept_or_resample(
    p_BTV: Tensor,
    q_BMN: Tensor,
    draft_BM: Tensor,
    accept_noise_BM: Tensor,
    final_noise_B: Tensor,
    limit_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """``verification.accept_or_resample``."""
    given = draft_BM, accept_noise_BM.double(), final_noise_B.double(), limit_B
    if not (native.fits(p_BTV, q_BMN) and p_BTV.is_contiguous() and q_BMN.is_contiguous()):
        return verification.accept_or_resample.plain(p_BTV, q_BMN, *given)
    tokens_BT, accepted_B = draft_BM.new_empty(p_BTV.shape[:2]), torch.empty_like(limit_B)
    whole = (tensor.contiguous() for tensor in given)
    sizes = *draft_BM.shape, p_BTV.shape[-1], q_BMN.shape[-1]
    native.call("judge_drafts", p_BTV, q_BMN, *whole, tokens_BT, accepted_B, *sizes)
    return tokens_BT, accepted_B


sampling.draw.register("cpu", draw)
verification.accept_or_resample.register("cpu", accept_or_resample)

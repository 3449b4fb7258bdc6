"""Batch-invariant passes: the bits of a token's results do not depend on other tokens of the pass.

Speculative decoding reads the drafts of a round in one pass, while plain decoding reads one token
at a time. If both give the same bits, they give the same text, near-ties included. Most kernels
round a row in the same way for any number of rows (for example packed products, ``cpu/packed.py``);
the others call :func:`is_batch_invariant` and compute token by token if it is true. Passes are
batch-invariant on CPUs only.

Shapes: B rows, T new positions, P stored positions, N heads, M key heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

# A pass of at most this many positions per row is a verify pass or a plain one. A wider pass reads
# a prompt, which is never read again with another width.
FEW = 16

_invariant: ContextVar[bool] = ContextVar("batch_invariant", default=False)


@contextmanager
def batch_invariant_pass(width: int, device: torch.device) -> Iterator[None]:
    """Makes a pass over ``width`` positions of every row batch-invariant if it is narrow."""
    token = _invariant.set(device.type == "cpu" and width <= FEW)
    try:
        yield
    finally:
        _invariant.reset(token)


def is_batch_invariant() -> bool:
    """Whether the current pass must be batch-invariant; compiled programs never are."""
    return not torch.compiler.is_compiling() and _invariant.get()


def by_token(function: Callable[[Tensor], Tensor], x: Tensor, dim: int = 0) -> Tensor:
    """``function(x)``; in a batch-invariant pass, applied to each token along ``dim`` alone."""
    if not is_batch_invariant():
        return function(x)
    return torch.cat([function(token) for token in x.split(1, dim)], dim)


def attend_by_query(
    query_BTNH: Tensor, key_BMPH: Tensor, value_BMPH: Tensor, mask: Tensor, *, grouped: bool
) -> Tensor:
    """Attention over a cache, with each query computed alone: [B, T, N, H].

    PyTorch's CPU kernel rounds differently for several queries at a time, and on its second thread.
    So every query is a batch entry or head of its own, on one thread, which costs a few
    microseconds per layer.

    Args:
        query_BTNH: the new queries.
        key_BMPH: stored keys; for a single row, expanded to [T, M, P, H].
        value_BMPH: stored values, likewise.
        mask: additive, [T, P] or [B, T, P].
        grouped: whether several query heads share a key head.
    """
    batch, n_new, n_heads, _ = query_BTNH.shape
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if batch == 1:
            # The queries become batch entries that share their keys: [T, N, 1, H].
            return F.scaled_dot_product_attention(
                query_BTNH.transpose(0, 1).transpose(1, 2),
                key_BMPH,
                value_BMPH,
                attn_mask=mask.reshape(n_new, 1, 1, -1),
                enable_gqa=grouped,
            ).reshape(1, n_new, n_heads, -1)
        # The queries become heads: [B, N T, 1, H], those of the same key head adjacent.
        mask_BNTP = mask.expand(batch, n_new, -1).unsqueeze(1).expand(-1, n_heads, -1, -1)
        mixed = F.scaled_dot_product_attention(
            query_BTNH.transpose(1, 2).reshape(batch, n_heads * n_new, 1, -1),
            key_BMPH,
            value_BMPH,
            attn_mask=mask_BNTP.reshape(batch, n_heads * n_new, 1, -1),
            enable_gqa=grouped or n_new > 1,
        )
        return mixed.view(batch, n_heads, n_new, -1).transpose(1, 2)
    finally:
        torch.set_num_threads(threads)

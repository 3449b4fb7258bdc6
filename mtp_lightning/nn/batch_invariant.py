"""Batch-invariant passes: a token's numbers do not depend on the other tokens of the pass.

Speculative decoding reads the drafts of a round in one pass, where plain decoding reads one token
at a time. Both give the same text, near-ties included, if they give the same bits. Most kernels
round a row in the same way however many rows they are given (packed products do, see
``cpu/packed.py``); the others ask here, and then compute token by token. Passes are batch-invariant
on CPUs only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

# A pass of up to so many positions a row is a verify pass or a plain one. A wider one reads a
# prompt, which is never read again in another width.
FEW = 16

_invariant: ContextVar[bool] = ContextVar("batch_invariant", default=False)


@contextmanager
def batch_invariant_pass(width: int, device: torch.device) -> Iterator[None]:
    """Around a pass over ``width`` positions of every row; a narrow one is batch-invariant."""
    token = _invariant.set(device.type == "cpu" and width <= FEW)
    try:
        yield
    finally:
        _invariant.reset(token)


def is_batch_invariant() -> bool:
    """Whether the open pass must be batch-invariant. A compiled program never is."""
    return not torch.compiler.is_compiling() and _invariant.get()


def by_token(function: Callable[[Tensor], Tensor], x: Tensor, dim: int = 0) -> Tensor:
    """``function(x)``; in a batch-invariant pass applied to every token by itself, along
    ``dim``."""
    if not is_batch_invariant():
        return function(x)
    return torch.cat([function(token) for token in x.split(1, dim)], dim)


def attend_by_query(
    query_BTNH: Tensor, key_BMPH: Tensor, value_BMPH: Tensor, mask: Tensor, *, grouped: bool
) -> Tensor:
    """Attention over a cache, every query by itself: [B, T, N, H].

    PyTorch's CPU kernel gives other roundings for several queries at a time, and in the scratch
    memory of its second thread; so it runs on one here. The cost is a few microseconds a layer.

    Args:
        query_BTNH: the new queries.
        key_BMPH: stored keys; of a single row expanded to [T, M, P, H].
        value_BMPH: stored values, likewise.
        mask: additive, [T, P] or [B, T, P].
        grouped: several query heads share a key head.
    """
    batch, n_new, n_heads, _ = query_BTNH.shape
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if batch == 1:
            # The queries are the rows of a batch that share their keys: [T, N, 1, H].
            return F.scaled_dot_product_attention(
                query_BTNH.transpose(0, 1).transpose(1, 2),
                key_BMPH,
                value_BMPH,
                attn_mask=mask.reshape(n_new, 1, 1, -1),
                enable_gqa=grouped,
            ).reshape(1, n_new, n_heads, -1)
        # They are heads of one query: [B, N T, 1, H], those of a key head side by side.
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

"""Passes in which a token's numbers do not depend on how many others are computed with it.

Speculative decoding reads the drafts of a round in one pass where plain decoding reads one token
at a time. The two give the same text, near-ties included, if they give the same bits. Most kernels
round a row alike however many rows they are given (packed products do, see ``matmul.pack``); the
others ask here, and then compute token by token. That is only so on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

# A pass of up to this many positions a row is a verify pass or a plain one; a wider one reads a
# prompt, which nobody reads again in another width.
FEW = 16

_exact: ContextVar[bool] = ContextVar("exact", default=False)


@contextmanager
def exact_pass(width: int, device: torch.device) -> Iterator[None]:
    """Around a pass over ``width`` positions of every row, which is to be exact if it is narrow."""
    token = _exact.set(device.type == "cpu" and width <= FEW)
    try:
        yield
    finally:
        _exact.reset(token)


def is_exact() -> bool:
    """Whether the open pass must compute token by token. A compiled program never does."""
    return not torch.compiler.is_compiling() and _exact.get()


def by_token(function: Callable[[Tensor], Tensor], x: Tensor, dim: int = 0) -> Tensor:
    """``function(x)``, in an exact pass applied to every token, along ``dim``, by itself."""
    if not is_exact():
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

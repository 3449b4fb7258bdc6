"""Batch-invariant passes: the bits of a token's results do not depend on other tokens of the pass.

Speculative decoding reads the drafts of a round in one pass, while plain decoding reads one token
at a time. If both give the same bits, they give the same text, near-ties included. Most kernels
round a row in the same way for any number of rows (for example packed products, ``cpu/packed.py``);
the others call :func:`is_batch_invariant` and compute token by token if it is true. Passes are
batch-invariant on CPUs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# A pass of at most this many positions per row is a verify pass or a plain one. A wider pass reads
# a prompt, which is never read again with another width.
MAX_VERIFY_WIDTH = 16
# Fused code keeps wider passes batch-invariant, too, up to this many positions in all.
MAX_INVARIANT_POSITIONS = 512

_invariant: ContextVar[bool] = ContextVar("batch_invariant", default=False)


@contextmanager
def batch_invariant_pass(width: int, device: torch.device) -> Iterator[None]:
    """Makes a pass over ``width`` positions of every row batch-invariant if it is narrow."""
    token = _invariant.set(device.type == "cpu" and width <= MAX_VERIFY_WIDTH)
    try:
        yield
    finally:
        _invariant.reset(token)


def passes_over(
    lengths: Sequence[int], device: torch.device, *, wide_alone: bool = False
) -> Iterator[slice]:
    """The rows of each pass, as slices, that reads so many tokens of every row. On a CPU a pass has
    at most :data:`MAX_INVARIANT_POSITIONS` positions or one row, so that a row's bits depend on its
    own length only; ``wide_alone`` is for layers whose bits depend on other rows of a wide pass."""
    on_cpu = device.type == "cpu"
    most = MAX_INVARIANT_POSITIONS if on_cpu else math.inf
    most_width = MAX_VERIFY_WIDTH if on_cpu and wide_alone else math.inf
    start = widest = 0
    for row, length in enumerate(lengths):
        widest = max(widest, length)
        if row > start and (widest > most_width or widest * (row + 1 - start) > most):
            yield slice(start, row)
            start, widest = row, length
    yield slice(start, len(lengths))


def is_batch_invariant() -> bool:
    """Whether the current pass must be batch-invariant; compiled programs never are."""
    return not torch.compiler.is_compiling() and _invariant.get()


def by_token(function: Callable[[Tensor], Tensor], x: Tensor, dim: int = 0) -> Tensor:
    """``function(x)``; in a batch-invariant pass, applied to each token along ``dim`` alone."""
    if not is_batch_invariant():
        return function(x)
    return torch.cat([function(token) for token in x.split(1, dim)], dim)


def by_row(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """:func:`by_token` along all axes of ``x`` but the last."""
    rows = by_token(function, x.reshape(-1, x.shape[-1]))
    return rows.view(*x.shape[:-1], rows.shape[-1])

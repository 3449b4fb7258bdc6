"""Windows with tokens ahead, and a plain search for the tokens ahead of a position."""

from __future__ import annotations

import torch

from data_modules.windows import WindowBatch


def ahead_windows(
    rows: int,
    seq_len: int,
    lookahead: int,
    *,
    ids: int = 37,
    documents: bool = False,
    scored: bool = False,
    seed: int = 1,
) -> WindowBatch:
    """Random tokens below ``ids``, in windows as long as a data module makes them for this
    look-ahead."""
    generator = torch.Generator().manual_seed(seed)
    extra = max(min(lookahead, seq_len + 1) - 2, 0)
    shape = (rows, seq_len + 2 + extra)
    starts = torch.rand(shape, generator=generator) < 0.2
    return WindowBatch(
        torch.randint(0, ids, shape, generator=generator),
        1,
        starts.cumsum(1) if documents else None,
        torch.rand(shape, generator=generator) < 0.6 if scored else None,
        extra=extra,
    )


def nearest(batch: WindowBatch, row: int, i: int, first: int, last: int) -> dict[int, int]:
    """The distance of the nearest occurrence of each id that counts, found one token at a time."""
    distances: dict[int, int] = {}
    for ahead in range(first, last + 1):
        at = i + ahead
        if at >= batch.tokens.shape[1]:
            break
        if batch.documents is not None and batch.documents[row, at] != batch.documents[row, i]:
            break
        if batch.scored is None or batch.scored[row, at]:
            distances.setdefault(int(batch.tokens[row, at]), ahead)
    return distances

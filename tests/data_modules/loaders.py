"""Loaders of files whose token at position i is i."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_modules.loader import WindowLoader
from data_modules.token_store import PIECES, TokenFile
from data_modules.window_dataset import WindowDataset
from data_modules.windows import WindowBatch

T = 8


def token_file(
    folder: Path, n_tokens: int, starts: Sequence[int] = (0,), pieces: Sequence[tuple] = ()
) -> TokenFile:
    """A token file whose token at position i is i."""
    path = folder / f"{n_tokens}.bin"
    np.arange(n_tokens, dtype=np.uint32).tofile(path)
    np.save(path.with_suffix(".starts.npy"), np.array(starts, np.int64))
    np.save(path.with_suffix(".pieces.npy"), np.array(list(pieces), PIECES))
    return TokenFile(path, "uint32", n_tokens, n_tokens, len(starts))


def loader_of(
    folder: Path, *, windows: int = 25, depth: int = 2, batch_size: int = 4, **options
) -> WindowLoader:
    dataset = WindowDataset(token_file(folder, (windows + 1) * T + 1), seq_len=T, depth=depth)
    assert len(dataset) == windows
    return WindowLoader(dataset, batch_size=batch_size, **options)


def numbers(batches) -> list[list[int]]:
    """Window numbers of each batch: the tokens are positions."""
    return [(batch.tokens[:, 0] // T).tolist() for batch in batches]


def stream(loader: WindowLoader, n: int) -> list[WindowBatch]:
    """The next n batches, of as many epochs as that takes."""
    read: list[WindowBatch] = []
    while len(read) < n:
        for batch in loader:
            read.append(batch)
            if len(read) == n:
                break
    return read

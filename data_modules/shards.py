"""Parts of files, read as one array of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mtp_lightning.errors import UserError


@dataclass(frozen=True)
class Shard:
    """``n_tokens`` contiguous token ids in a file, after ``offset`` bytes, in numpy's own layout;
    ``dtype`` includes the byte order (``<u2``), and ``stamp`` is that of the file whose ids these
    are."""

    path: Path
    dtype: str
    offset: int
    n_tokens: int
    stamp: tuple[int, int, int] | None = None

    def require_unchanged(self) -> None:
        """Refuses a file that another program wrote to or replaced."""
        try:
            unchanged = stamp_of(self.path) == self.stamp
        except FileNotFoundError:  # removed; the system keeps it while it is mapped
            return
        if not unchanged:
            raise UserError(
                f"{self.path} was written to or replaced while it was being read: start again."
            )

    def tokens(self) -> np.ndarray:
        """``[n_tokens]`` read-only memory map."""
        self.require_unchanged()
        return np.memmap(
            self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(self.n_tokens,)
        )

    def part(self, first: int, last: int) -> Shard:
        """Its tokens ``first`` to ``last - 1``."""
        offset = self.offset + first * np.dtype(self.dtype).itemsize
        return replace(self, offset=offset, n_tokens=last - first)


def cut(shards: Sequence[Shard], n_tokens: int) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    """The first ``n_tokens`` tokens of shards, and the rest."""
    before: list[Shard] = []
    after: list[Shard] = []
    for shard in shards:
        n_before = min(max(n_tokens, 0), shard.n_tokens)
        if n_before:
            before.append(shard.part(0, n_before))
        if n_before < shard.n_tokens:
            after.append(shard.part(n_before, shard.n_tokens))
        n_tokens -= shard.n_tokens
    return tuple(before), tuple(after)


class ShardedTokens:
    """Memory maps of shards, none of them empty, read as one array by slices and by windows.

    If another program writes to a mapped file, its ids change while they are read, and if the file
    is truncated, the system kills the process. So every read first checks that the file is
    unchanged.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        # Plain arrays of the maps: indexing a np.memmap is slower.
        self._maps = [np.asarray(shard.tokens()) for shard in shards]
        sizes = np.array([shard.n_tokens for shard in shards], np.int64)
        self._ends = sizes.cumsum()
        self._begins = self._ends - sizes

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: slice) -> np.ndarray:
        """Ids of a slice without a step; a view if one shard holds it."""
        first, last, step = indices.indices(len(self))
        assert step == 1
        return self._span(first, last)

    def windows(self, first: np.ndarray, length: int) -> np.ndarray:
        """``[B, length]`` ids from each of the indices ``first`` [B] on."""
        return np.stack([self._span(int(a), int(a) + length) for a in first])

    def locate(self, index: int) -> tuple[Path, int]:
        """The file of a token, and the token's index in it."""
        number = int(self._ends.searchsorted(index, side="right"))
        return self.shards[number].path, index - int(self._begins[number])

    def _span(self, first: int, last: int) -> np.ndarray:
        number = int(self._ends.searchsorted(first, side="right"))
        parts: list[np.ndarray] = []
        while first < last:
            self.shards[number].require_unchanged()
            begin, end = int(self._begins[number]), int(self._ends[number])
            parts.append(self._maps[number][first - begin : min(last, end) - begin])
            first, number = end, number + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self._maps[0].dtype)


def windows_at(tokens: np.ndarray | ShardedTokens, first: np.ndarray, length: int) -> np.ndarray:
    """``[B, length]`` ids from each of the indices ``first`` [B] on."""
    if isinstance(tokens, ShardedTokens):
        return tokens.windows(first, length)
    return sliding_window_view(tokens, length)[first]


def stamp_of(path: Path) -> tuple[int, int, int]:
    """Size, time and inode of a file, without the ctime of ``digests.stamp``: chmod changes it."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino

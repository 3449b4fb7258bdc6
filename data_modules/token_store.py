"""The packed token store: a corpus as token ids in memory-mapped files.

A store is a folder::

    meta.json            tokens, bytes and documents per split, fingerprints, versions, dtype,
                         share of the long validation lines that also occur in training documents
    train.bin  val.bin   token ids of the documents in order, each ended by the end-of-text token
    train.starts.npy ... int64 offset of every document in the .bin file
    val.pieces.npy       pieces to choose the evaluation text from, see PIECES
    tokenizer_state.json the tokenizer that made the ids
    digests.json         digests of all the other files, see :mod:`data_modules.seal`

A view (``data_modules/token_files``) is a store without .bin files: its ids are in files that other
programs wrote.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from data_modules.seal import damaged
from data_modules.shards import Shard, ShardedTokens, cut
from mtp_lightning.errors import UserError
from mtp_lightning.settings import is_whole
from mtp_lightning.stored import read_json

FORMAT = 2
"""Raised whenever newer code must not read a store that older code wrote."""

PIECES = np.dtype([("document", "<i8"), ("start", "<i8"), ("bytes", "<i8"), ("digest", "S32")])
"""One row per piece of a document, in order: the document's number in its split, the offset of the
piece's first token, its UTF-8 bytes, and a hex digest of its text. A document of up to 65,536
characters is one piece; the cuts of a longer one do not depend on the tokenizer."""

_BLOCK = 1 << 20  # tokens per step; a longer document is a step of its own


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 if every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


@dataclass(frozen=True)
class TokenFile:
    """One split of a store. Cheap to pickle: loader workers open the file themselves."""

    path: Path  # the ``.bin`` file, or its name if the tokens are in ``shards``
    dtype: str  # its name
    n_tokens: int  # end-of-text tokens included
    n_bytes: int | None  # UTF-8 bytes of the text, end-of-text tokens not counted; None if unknown
    n_documents: int
    shards: tuple[Shard, ...] | None = None  # parts of files that hold the tokens, if it is a view

    def tokens(self) -> np.ndarray | ShardedTokens:
        """``[n_tokens]`` read-only memory map, or several maps that are read as one array."""
        if self.n_tokens == 0:  # mmap refuses empty files
            return np.empty(0, self.dtype)
        if self.shards is None:
            return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.n_tokens,))
        return ShardedTokens(self.shards)

    def starts(self) -> np.ndarray:
        """``[n_documents]`` int64 offset of each document's first token, a memory map."""
        return _array(self.path.with_suffix(".starts.npy"), mmap_mode="r")

    def pieces(self) -> np.ndarray:
        """``[n_pieces]`` of dtype :data:`PIECES`, for the validation split."""
        return _array(self.path.with_suffix(".pieces.npy"))

    def token_frequency(self, vocab_size: int) -> np.ndarray:
        """``[vocab_size]`` int64, how often each id occurs, end-of-text included."""
        return count_ids(self.tokens(), vocab_size)

    def document_frequency(self, vocab_size: int) -> np.ndarray:
        """``[vocab_size]`` int64 number of documents that hold each id, end-of-text included."""
        tokens, starts = self.tokens(), self.starts()
        edges = np.append(starts, self.n_tokens)
        frequency = np.zeros(vocab_size, np.int64)
        first = 0
        while first < len(starts):
            last = max(int(edges.searchsorted(edges[first] + _BLOCK, side="right")) - 1, first + 1)
            owner = np.repeat(np.arange(last - first), np.diff(edges[first : last + 1]))
            block = tokens[edges[first] : edges[last]].astype(np.int64)
            # One number for each pair of document and id, counted once.
            pairs = np.unique(owner * vocab_size + block)
            frequency += np.bincount(pairs % vocab_size, minlength=vocab_size)
            first = last
        return frequency


class TokenStore:
    """A finished store, opened; for a view, ``shards`` hold the tokens of all splits in order.

    Raises:
        UserError: if the files do not match ``meta.json`` (damaged after they were built).
    """

    def __init__(self, folder: Path, shards: Sequence[Shard] | None = None) -> None:
        self.folder = folder
        self.splits: dict[str, TokenFile] = {}
        try:
            self.meta: dict[str, Any] = read_json(folder / "meta.json")
            for name, facts in self.meta["splits"].items():
                split_shards = None
                if shards is not None:
                    split_shards, shards = cut(shards, facts["tokens"])
                self.splits[name] = self._open(name, split_shards)
        except (FileNotFoundError, AttributeError, KeyError, TypeError, ValueError) as error:
            why = str(error) if isinstance(error, UserError) else repr(error)
            raise damaged(folder, why) from error

    def _open(self, name: str, shards: tuple[Shard, ...] | None) -> TokenFile:
        path = self.folder / f"{name}.bin"
        if not re.fullmatch("u?int(8|16|32|64)", str(self.meta["dtype"])):
            raise UserError(f"its ids have the type {self.meta['dtype']!r}")
        dtype = np.dtype(self.meta["dtype"])
        facts = self.meta["splits"][name]
        counts = (facts["tokens"], facts["bytes"], facts["documents"])
        if not all(is_whole(n) or n is None for n in counts):
            raise UserError(f"its {name} has {counts}")
        expected = facts["tokens"] * dtype.itemsize
        if shards is None and path.stat().st_size != expected:
            raise UserError(f"{path.name} has {path.stat().st_size} bytes instead of {expected}")
        return TokenFile(path, dtype.name, *counts, shards)

    def __getitem__(self, split: str) -> TokenFile:
        return self.splits[split]


def count_ids(tokens: np.ndarray | ShardedTokens, vocab_size: int) -> np.ndarray:
    """``[vocab_size]`` int64, how often each id occurs."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _BLOCK):
        counts += np.bincount(tokens[start : start + _BLOCK].astype(np.int64), minlength=vocab_size)
    return counts


def save_array(path: Path, array: np.ndarray) -> None:
    """``np.save``, whose own way to write to a file reports a full disk as two sizes."""
    with path.open("wb") as file:
        np.save(SimpleNamespace(write=file.write), array)  # type: ignore[arg-type]


def _array(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        return np.load(path, mmap_mode)
    except (OSError, EOFError, ValueError) as error:
        raise damaged(path.parent, f"{path.name}: {error}") from error

"""Chunks of litdata, as ``litdata.optimize(..., item_loader=TokensLoader())`` writes them.

``index.json`` names the chunks of its folder and the type of their ids. A chunk is the number n of
its items (uint32), n + 1 byte offsets (uint32) of each item's beginning and the last one's end, and
the concatenated ids of all items. An item is a document. litdata itself is not needed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from data_modules.shards import Shard
from mtp_lightning.errors import UserError

INDEX = "index.json"
_LOADER = "TokensLoader"
_TYPES = {
    "no_header_tensor": {11: "<u1", 12: "<i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4"}
    | {17: "<i8", 18: "<i8", 20: "<u2"},
    "no_header_numpy": dict(enumerate(("<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4"))),
}
"""Type codes of the integer types, by the serializer's name."""


def chunk_paths(index: Path) -> list[Path] | None:
    """The chunks that an index names, in its order; None for a file that is not a litdata index.
    Refuses chunks that hold anything but rows of ids."""
    chunks = _read_index(index, index.stat().st_mtime_ns)
    return None if chunks is None else [index.parent / name for name in chunks[0]]


def read_chunk(path: Path) -> tuple[Shard, np.ndarray] | None:
    """The ids of a chunk, and the first token of every document; None if the file is not a chunk.

    Raises:
        UserError: if it or its index is truncated or damaged, or it holds anything but rows of ids.
    """
    index = path.parent / INDEX
    chunks = _read_index(index, index.stat().st_mtime_ns) if index.is_file() else None
    if chunks is None:
        return None
    if path.name not in chunks[0]:
        raise UserError(
            f"{path} is not among the chunks of {index}: copy both again, or move files of another "
            "kind to a folder of their own"
        )
    dtype = np.dtype(chunks[1])
    offsets = item_offsets(path)
    lengths = np.zeros(0, np.int64) if offsets is None else np.diff(offsets)
    if offsets is None or lengths.min() < 0 or (lengths % dtype.itemsize).any():
        raise UserError(
            f"{path} is truncated or damaged: its header does not match its "
            f"{path.stat().st_size:,} bytes and the {dtype.name} of {index}; copy both files again"
        )
    begin, end = int(offsets[0]), int(offsets[-1])
    if begin == end:
        raise UserError(f"{path} holds no ids: leave it out of the paths")
    starts = np.unique((offsets[:-1] - begin) // dtype.itemsize)
    n_tokens = (end - begin) // dtype.itemsize
    return Shard(path, dtype.str, begin, n_tokens), starts[starts < n_tokens]


def item_offsets(path: Path) -> np.ndarray | None:
    """Byte offsets of a chunk's items and of its end; None for a file that does not begin like a
    chunk of its size."""
    size = path.stat().st_size
    if size < 12:
        return None
    n_items, first = map(int, np.fromfile(path, "<u4", 2))
    if not n_items or first != 4 * (n_items + 2) or first > size:
        return None
    offsets = np.fromfile(path, "<u4", n_items + 1, offset=4).astype(np.int64)
    return offsets if offsets[-1] == size else None


@functools.lru_cache(maxsize=8)
def _read_index(index: Path, changed: int) -> tuple[dict[str, None], str] | None:
    """Names of chunks and the type of their ids; None for the index of something else. ``changed``,
    the file's time stamp, makes the cache miss when the file changes."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(
            f"{index} is not JSON, or is truncated: copy it again; without it, the files next to "
            "it cannot be told from chunks of litdata"
        ) from None
    try:
        config = content["config"]
        names = {str(chunk["filename"]): None for chunk in content["chunks"]}
        serializer, _, number = str(config["data_format"][0]).partition(":")
    except (KeyError, TypeError, IndexError):
        return None
    if not names:
        raise UserError(f"{index} names no chunk: there is nothing to read")
    if any(not name.isprintable() or set(name) & set("/\\") for name in names):
        raise UserError(f"{index} names chunks outside its folder: it is not read")
    for key in ("compression", "encryption"):
        if config.get(key):
            raise UserError(
                f"{index} is of chunks with {key} ({config[key]!s:.60}), which cannot be memory-"
                "mapped: write them again without it"
            )
    types = {str(code): dtype for code, dtype in _TYPES.get(serializer, {}).items()}
    dtype = types.get(number)
    if config.get("item_loader") != _LOADER or len(config["data_format"]) != 1 or dtype is None:
        raise UserError(
            f"{index} is of items ({config['data_format']!s:.60}, item_loader "
            f"{config.get('item_loader')!s:.60}) that are not rows of token ids: write one "
            f"tensor of ids per document, with item_loader={_LOADER}()"
        )
    return names, dtype

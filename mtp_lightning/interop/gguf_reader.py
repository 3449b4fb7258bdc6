"""gguf's reader of a file, once for all questions.

transformers opens a GGUF file again for its tokenizer; gguf's reader makes several views of a
memory map for each of the vocabulary's tokens. Of a vocabulary of 49 k tokens, each takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np


@contextmanager
def one_reader(path: Path) -> Iterator[Any]:
    """Yield gguf's reader of a file. Within the block transformers uses it, too.

    Raises:
        ValueError, IndexError, KeyError, OverflowError: the file is damaged.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        """Reads through plain arrays: numpy's memory maps track the owner of every slice."""

        def __init__(self, path: Any) -> None:
            with mock.patch.object(np, "memmap", _plain_map):
                super().__init__(path)

        def _get_field_parts(self, at: int, kind: int) -> Any:
            if (found := _strings(self.data, at, kind)) is not None:
                return found
            return super()._get_field_parts(at, kind)

    reader = Reader(path)

    def known(other: Any, *args: Any) -> Any:
        return reader if Path(other) == path else Reader(other, *args)

    with mock.patch.object(gguf, "GGUFReader", known):
        yield reader


def _strings(data: Any, at: int, kind: int) -> tuple[int, list[Any], list[int], list[Any]] | None:
    """What gguf's reader finds of an array of strings: its size, its parts, the indices of those
    that are strings, its types. None for anything else, and in the other byte order.

    Raises:
        IndexError: a string ends after the file.
    """
    from gguf import GGUFValueType

    head = data[at : at + 12].tobytes()
    of = GGUFValueType.STRING
    if kind != GGUFValueType.ARRAY or len(head) < 12 or int.from_bytes(head[:4], "little") != of:
        return None
    count, end = int.from_bytes(head[4:], "little"), at + 12
    parts = [data[at : at + 4], data[at + 4 : end]]
    for _ in range(count):
        size = int.from_bytes(data[end : end + 8].tobytes(), "little")
        begin, end = end + 8, end + 8 + size
        if end > len(data):
            raise IndexError("a string ends after the file")
        parts.append(data[begin:end])
    return end - at, parts, list(range(2, 2 + count)), [GGUFValueType.ARRAY, of]


_memmap = np.memmap


def _plain_map(path: Any, mode: Any = "r") -> Any:
    return _memmap(path, mode=mode).view(np.ndarray)

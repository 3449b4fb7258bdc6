"""gguf's reader of a file, once for all questions.

transformers opens a GGUF file again for its tokenizer; gguf's reader makes several views of a
memory map for each of the vocabulary's tokens. Of a vocabulary of 49 k tokens, each takes seconds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
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
            if (found := _array(self.data, at, kind, self.gguf_scalar_to_np)) is not None:
                return found
            return super()._get_field_parts(at, kind)

    reader = Reader(path)

    def known(other: Any, *args: Any) -> Any:
        return reader if Path(other) == path else Reader(other, *args)

    with mock.patch.object(gguf, "GGUFReader", known):
        yield reader


def _array(
    data: Any, at: int, kind: int, scalars: Mapping[Any, Any]
) -> tuple[int, list[Any], list[int], list[Any]] | None:
    """What gguf's reader finds of an array of strings or numbers: its size, its parts, the indices
    of those that are elements, its types. None for anything else, and in the other byte order.

    Args:
        data: the file's bytes.
        at: where the array begins.
        kind: the type of the field.
        scalars: numpy's type of every GGUF type of numbers.

    Raises:
        IndexError: an element ends after the file.
    """
    from gguf import GGUFValueType

    head = data[at : at + 12].tobytes()
    if kind != GGUFValueType.ARRAY or len(head) < 12:
        return None
    of, count = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:], "little")
    end = at + 12
    parts = [data[at : at + 4], data[at + 4 : end]]
    if of == GGUFValueType.STRING:
        length, last = struct.Struct("<Q"), len(data)
        for _ in range(count):
            begin = end + length.size
            end = begin + length.unpack_from(data, end)[0] if begin <= last else begin
            if end > last:
                raise IndexError("a string ends after the file")
            parts.append(data[begin:end])
    elif of in scalars and count:
        begin, end = end, end + count * np.dtype(scalars[of]).itemsize
        if end > len(data):
            raise IndexError("a number ends after the file")
        numbers = data[begin:end].view(scalars[of])
        parts += [numbers[i : i + 1] for i in range(count)]
    else:
        return None
    types = [GGUFValueType.ARRAY, GGUFValueType(of)]
    return end - at, parts, list(range(2, 2 + count)), types


_memmap = np.memmap


def _plain_map(path: Any, mode: Any = "r") -> Any:
    return _memmap(path, mode=mode).view(np.ndarray)

"""Checks the counts in a GGUF file against its size, before a reader makes lists of them."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from mtp_lightning.errors import UserError
from mtp_lightning.stored import LARGEST_VOCAB

_STRING, _ARRAY = 8, 9
# Bytes of a value, by its type in the file.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# Entries of all arrays: tokens, their types and scores, and merges. gguf makes objects of each.
_LARGEST_ARRAYS = 4 * LARGEST_VOCAB
_LARGEST_COUNT = 1 << 20


def require_counts(path: Path) -> None:
    """Refuses a file whose counts and lengths exceed its contents.

    Raises:
        UserError: naming the count.
    """
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _Counts(content).check()
        except (ValueError, struct.error) as error:
            raise UserError(f"{path} is damaged or not a GGUF file: {error}.") from error


class _Counts:
    """One pass over the header, the fields and the tensors' descriptions."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at, self._entries = content, 0, 0
        self._order = "<"

    def check(self) -> None:
        if self._content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        if self._number("I") & 0xFFFF == 0:
            self._order, self._at = ">", 4
            self._number("I")
        tensors, fields = self._number("Q"), self._number("Q")
        if max(tensors, fields) > _LARGEST_COUNT:
            raise ValueError(f"it states {tensors:,} tensors and {fields:,} fields")
        for _ in range(fields):
            self._skip(self._number("Q"), 1)
            self._value(self._number("I"))
        for _ in range(tensors):
            self._skip(self._number("Q"), 1)
            numbers = 1
            for _ in range(self._fitting(self._number("I"), 8)):
                numbers *= self._number("Q")
                if numbers > 8 * len(self._content):  # every type takes at least a bit
                    raise ValueError("a tensor has more values than the file can hold")
            self._skip(12, 1)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip(self._number("Q"), 1)
        elif kind == _ARRAY:
            of = self._number("I")
            if of != _STRING and of not in _SIZES:
                raise ValueError(f"it has an array of the kind {of}")
            count = self._fitting(self._number("Q"), _SIZES.get(of, 8))
            self._entries += count
            if self._entries > _LARGEST_ARRAYS:
                raise ValueError(f"its arrays have more than {_LARGEST_ARRAYS:,} entries")
            if of != _STRING:
                self._skip(count, _SIZES[of])
            else:
                self._strings(count)
        elif kind in _SIZES:
            self._skip(1, _SIZES[kind])
        else:
            raise ValueError(f"it has a value of the kind {kind}")

    def _strings(self, count: int) -> None:
        """Skip strings, of which there may be millions."""
        length, at, end = struct.Struct(f"{self._order}Q"), self._at, len(self._content)
        for _ in range(count):
            (size,) = length.unpack_from(self._content, at)
            at += length.size + size
            if at > end:
                raise ValueError(f"it has a string of {size:,} bytes that ends after it")
        self._at = at

    def _number(self, form: str) -> int:
        (found,) = struct.unpack_from(f"{self._order}{form}", self._content, self._at)
        self._at += struct.calcsize(f"={form}")
        return int(found)

    def _fitting(self, count: int, size: int) -> int:
        """A count of items of a size, which must still be in the file."""
        left = len(self._content) - self._at
        if count * size > left:
            raise ValueError(f"it states {count:,} more items, but {left:,} bytes are left")
        return count

    def _skip(self, count: int, size: int) -> None:
        self._at += self._fitting(count, size) * size

"""The header of a GGUF file: the fields, and where the tensors are.

gguf's own reader trusts the counts in a file, and makes several array views for each token of a
vocabulary, which takes seconds. This reader compares every count and length with the size of the
file before it allocates memory.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError, require_package
from mtp_lightning.stored import LARGEST_VOCAB

_STRING, _ARRAY = 8, 9
# struct's letter for a number, by its type in the file.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_SIZE = struct.Struct("<Q")  # before a text
# Entries of all arrays: tokens, their types and scores, and merges.
_LARGEST_ARRAYS = 4 * LARGEST_VOCAB
_LARGEST_COUNT = 1 << 20
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_ALIGNMENT = 32


@dataclass(frozen=True)
class FileTensor:
    """The place of a tensor: its shape, outermost axis first, gguf's type ``kind`` of its numbers,
    the bytes of a row, which is the last axis, and its first byte in the file."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    row_bytes: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The fields of a file by key, where arrays are lists, and its tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, FileTensor]


def read_header(path: Path) -> Header:
    """The fields and the tensors of a file.

    Raises:
        UserError: the file is damaged, big-endian or of another version, or the package gguf is
            missing.
    """
    require_package("gguf", what=str(path), extra="hf")
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(content).header()
        except (ValueError, struct.error) as error:
            raise UserError(f"{path} is damaged or not a GGUF file: {error}.") from error


class _Reader:
    """One pass over the header, the fields and the tensors' descriptions."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._position, self._entries = content, 0, 0

    def header(self) -> Header:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version in (2 << 24, 3 << 24):
            raise ValueError("it is big-endian, and gguf-convert-endian makes it little-endian")
        if version not in (2, 3):
            raise ValueError(f"it is of version {version}, and 2 and 3 are known")
        n_tensors, n_fields = self._number("Q"), self._number("Q")
        if max(n_tensors, n_fields) > _LARGEST_COUNT:
            raise ValueError(f"it states {n_tensors:,} tensors and {n_fields:,} fields")
        fields = {self._text(): self._value() for _ in range(n_fields)}
        unplaced = [self._tensor() for _ in range(n_tensors)]
        tensors = {tensor.name: tensor for tensor in self._placed(unplaced, fields)}
        if len(fields) < n_fields or len(tensors) < n_tensors:
            raise ValueError("it has two fields or two tensors of one name")
        return Header(fields, tensors)

    def _tensor(self) -> FileTensor:
        """A tensor, its offset counted from the first tensor's."""
        name, dimensions = self._text(), self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions:,} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        if math.prod(shape) > 8 * len(self._content):  # every type takes at least a bit
            raise ValueError(f"{name} has more numbers than the file can hold")
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        kind = GGMLQuantizationType(self._number("I"))
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"{name} has rows of {shape[-1]:,} numbers in blocks of {block}")
        return FileTensor(name, shape, kind, shape[-1] // block * size, self._number("Q"))

    def _placed(self, tensors: list[FileTensor], fields: dict[str, Any]) -> list[FileTensor]:
        """The tensors with their offsets in the file."""
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its general.alignment is {alignment}")
        first = -(-self._position // alignment) * alignment
        placed = []
        for tensor in tensors:
            begin = first + tensor.offset
            if begin + math.prod(tensor.shape[:-1]) * tensor.row_bytes > len(self._content):
                raise ValueError(f"{tensor.name} ends after it")
            placed.append(replace(tensor, offset=begin))
        return placed

    def _value(self) -> Any:
        kind = self._number("I")
        if kind == _ARRAY:
            return self._array()
        return self._text() if kind == _STRING else self._number(_letter(kind))

    def _array(self) -> list[Any]:
        kind, count = self._number("I"), self._number("Q")
        self._entries += count
        if self._entries > _LARGEST_ARRAYS:
            raise ValueError(f"its arrays have more than {_LARGEST_ARRAYS:,} entries")
        if kind == _STRING:
            return self._texts(count)
        form = f"<{count}{_letter(kind)}"
        return list(struct.unpack(form, self._take(struct.calcsize(form))))

    def _texts(self, count: int) -> list[str]:
        """As many texts: a tokenizer's tokens and merges, a hundred thousand in a small model."""
        content, at, end = self._content, self._position, len(self._content)
        texts = []
        for _ in range(count):
            (size,) = _SIZE.unpack_from(content, at)
            begin, at = at + _SIZE.size, at + _SIZE.size + size
            if at > end:
                raise ValueError(f"it states {size:,} more bytes than it has")
            texts.append(content[begin:at].decode())
        self._position = at
        return texts

    def _text(self) -> str:
        return self._take(self._number("Q")).decode()

    def _number(self, letter: str) -> Any:
        form = f"<{letter}"
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, size: int) -> bytes:
        begin, self._position = self._position, self._position + size
        if self._position > len(self._content):
            raise ValueError(f"it states {size:,} more bytes than it has")
        return self._content[begin : self._position]


def _letter(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"it has a value of the kind {kind}")
    return _NUMBERS[kind]

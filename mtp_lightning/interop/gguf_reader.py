"""gguf's reader of a file, once for all questions.

transformers opens a GGUF file again for its tokenizer; gguf's reader makes a view of a memory map
for each of the vocabulary's tokens. Of a vocabulary of 49 k tokens, each takes seconds.
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

    reader = Reader(path)

    def known(other: Any, *args: Any) -> Any:
        return reader if Path(other) == path else Reader(other, *args)

    with mock.patch.object(gguf, "GGUFReader", known):
        yield reader


_memmap = np.memmap


def _plain_map(path: Any, mode: Any = "r") -> Any:
    return _memmap(path, mode=mode).view(np.ndarray)

"""The pre-tokenizer of BPE: splits text into words and numbers each distinct word at its first use.

Words are split as in GPT-2: a run of letters, digits or signs with one space before it, or a run
of white space without the space that the next word takes. Unlike GPT-2's, the pattern lists its
characters one by one (all non-ASCII ones count as letters) and bounds each run, so that Python's
``re``, the library's regex engine and ``cpp/words.cpp`` agree on every text. ``_`` joins words.
"""

from __future__ import annotations

import ctypes
import re
import weakref
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path

import numpy as np

from mtp_lightning.built import SUFFIX, open_built

_SPACE = r"[ \t\n\r\f\v]"
_LETTER = r"A-Za-z_\x{80}-\x{10FFFF}"
PATTERN = (
    rf" ?[{_LETTER}]{{1,64}}| ?[0-9]{{1,64}}"
    rf"| ?[^ \t\n\r\f\v0-9{_LETTER}]{{1,64}}"
    rf"|{_SPACE}{{1,64}}(?![^ \t\n\r\f\v])|{_SPACE}{{1,64}}"
)
# The same words for Python's engine, which is faster with the space before the alternatives.
_PYTHON_LETTER = _LETTER.replace(r"\x{80}-\x{10FFFF}", "\x80-\U0010ffff")
_PYTHON_PATTERN = re.compile(
    rf" ?(?:[{_PYTHON_LETTER}]{{1,64}}|[0-9]{{1,64}}|[^ \t\n\r\f\v0-9{_PYTHON_LETTER}]{{1,64}})"
    rf"|{_SPACE}{{1,64}}(?![^ \t\n\r\f\v])|{_SPACE}{{1,64}}"
)


class PythonPreTokenizer(dict[str, int]):
    """Word -> number, with ``re``; only a new word costs a call of a Python function."""

    def __init__(self) -> None:
        super().__init__()
        self._new: list[str] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self._new.append(word)
        return number

    def split(self, text: str) -> tuple[np.ndarray, list[str]]:
        """The numbers of a text's words [n], and the words that are new, in order."""
        words = _PYTHON_PATTERN.findall(text)
        numbers = np.fromiter(map(self.__getitem__, words), np.int32, len(words))
        new, self._new = self._new, []
        return numbers, new


class NativePreTokenizer:
    """The same with C++; its length is the number of distinct words so far."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._handle = library.words_new()
        weakref.finalize(self, library.words_free, self._handle)

    def split(self, text: str) -> tuple[np.ndarray, list[str]]:
        data = text.encode("utf-8")
        # The largest possible number of words; memory is only used where it is written.
        numbers = np.empty(len(data), np.int32)
        begins, ends = np.empty((2, len(data)), np.int64)
        n_known = len(self)
        pointers = (array.ctypes.data for array in (numbers, begins, ends))
        n_words = self._library.words_split(self._handle, data, len(data), *pointers)
        n_new = len(self) - n_known
        spans = zip(begins[:n_new].tolist(), ends[:n_new].tolist(), strict=True)
        return numbers[:n_words].copy(), [data[begin:end].decode() for begin, end in spans]

    def __len__(self) -> int:
        return int(self._library.words_count(self._handle))


library, _ = open_built(
    Path(__file__).with_name(f"_words{SUFFIX}"),
    Path(__file__).with_name("cpp"),
    {
        "words_new": ((), c_void_p),
        "words_free": ((c_void_p,), None),
        "words_count": ((c_void_p,), c_int64),
        "words_split": ((c_void_p, c_char_p, c_int64, *(c_void_p,) * 3), c_int64),
    },
)


PreTokenizer = PythonPreTokenizer | NativePreTokenizer


def new_pre_tokenizer() -> PreTokenizer:
    """An empty table, in C++ if it was built."""
    return PythonPreTokenizer() if library is None else NativePreTokenizer(library)

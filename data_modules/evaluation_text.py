"""The evaluation text: whole documents, chosen by bytes, and the windows that cover them.

Models can only be compared on the same text. So the text is chosen before there are tokens or
windows, and every one of its tokens is a depth-0 target exactly once.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import numpy as np
import torch

from data_modules.digests import digest
from data_modules.token_store import TokenFile
from data_modules.window_dataset import Windows
from data_modules.windows import WindowBatch


@dataclass(frozen=True, eq=False)
class EvaluationText:
    """N documents of a token file, in reading order."""

    file: TokenFile
    starts: np.ndarray  # ``[N]`` int64 index of each document's first token
    ends: np.ndarray  # ``[N]`` int64 index after its last token, the end-of-text token
    bytes: np.ndarray  # ``[N]`` int64 UTF-8 bytes of each document
    fingerprint: str  # hex digest of the texts: the same for every tokenizer

    @property
    def n_tokens(self) -> int:
        return int((self.ends - self.starts).sum())

    def documents(self) -> Iterator[np.ndarray]:
        """Yields the ids of each document."""
        tokens = self.file.tokens()
        return (tokens[a:b] for a, b in zip(self.starts, self.ends, strict=True))


COMPRESSED = 4 << 20
"""Bytes at the start of a text that are compressed: xz takes seconds for this many."""


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9 on a text, or on its first 4 MiB. They know only the text
    itself, so a trained model should need fewer."""
    text = text[:COMPRESSED]
    # The dictionary of xz -9 takes 64 MiB, of which a text needs its own length.
    xz = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(len(text), 4096)}
    packed = {"gzip": gzip.compress(text, 9, mtime=0), "xz": lzma.compress(text, filters=[xz])}
    return {f"{name}_bits_per_byte": 8 * len(data) / len(text) for name, data in packed.items()}


def choose(file: TokenFile, n_bytes: int | None) -> EvaluationText:
    """Chooses documents of a split until they hold ``n_bytes`` (UTF-8; None takes all), in the
    order of their digests, since neighbors in a corpus are alike.

    Documents are taken whole, except a long one that would exceed the number: only its pieces (of
    at most 65,536 characters, cut at line ends) up to the number are taken.
    """
    pieces = file.pieces()
    if not len(pieces):
        nothing = np.empty(0, np.int64)
        return EvaluationText(file, nothing, nothing, nothing, digest())
    # Documents are counted here, since one without text has a number and no piece.
    begins_document = np.diff(pieces["document"], prepend=-1) != 0
    first, number = np.flatnonzero(begins_document), begins_document.cumsum() - 1
    rank = pieces["digest"][first].argsort(kind="stable").argsort()  # of each document
    order = rank[number].argsort(kind="stable")
    if n_bytes is not None:
        order = order[: pieces["bytes"][order].cumsum().searchsorted(n_bytes) + 1]
    chosen = pieces[order]
    begins = np.flatnonzero(np.diff(chosen["document"], prepend=-1))
    # A piece ends where the next one begins, or with its document.
    next_piece, next_document = (
        np.append(starts[1:], file.n_tokens) for starts in (pieces["start"], file.starts())
    )
    ends = np.minimum(next_piece, next_document[pieces["document"]])[order]
    last = np.append(begins[1:], len(chosen)) - 1
    return EvaluationText(
        file,
        starts=chosen["start"][begins],
        ends=ends[last],
        bytes=np.add.reduceat(chosen["bytes"], begins),
        fingerprint=digest(*(name.decode() for name in chosen["digest"].tolist())),
    )


@dataclass(eq=False)
class EvaluationWindows(Windows):
    """Windows of an evaluation text.

    The stream is an end-of-text token, from which the first token is predicted, and then one
    document after another. Window i starts at token i * T of the stream, so every token of a
    document is a depth-0 target once; depth k has all but the first k tokens as targets. Padding
    after the end of the stream is never a target.

    With ``document_mask``, batches carry document ids, and the first token of every document, which
    no token of it precedes, is not a target.
    """

    text: EvaluationText
    _: KW_ONLY
    eot_id: int
    document_mask: bool = False

    def __len__(self) -> int:
        return -(-self.text.n_tokens // self.seq_len)

    @property
    def n_targets(self) -> int:
        """Number of targets of depth 0."""
        return self.text.n_tokens - self.document_mask * len(self.text.starts)

    def __getitem__(self, numbers: np.ndarray) -> WindowBatch:
        stream, last = self._stream
        end = len(stream) - 1
        index_BW = numbers[:, None] * self.seq_len + np.arange(self.width)
        inside = np.minimum(index_BW, end)
        texts = torch.from_numpy(last.searchsorted(inside).clip(max=len(last) - 1))
        documents = None
        if self.document_mask:  # the token before the first document belongs to no document
            documents = torch.from_numpy(np.where(inside == 0, -1, texts))
        scored = torch.from_numpy(index_BW < end)
        return self.batch(stream[inside], documents=documents, scored=scored, texts=texts)

    @cached_property
    def _stream(self) -> tuple[np.ndarray, np.ndarray]:
        """The stream, which is small, and the index in it of every document's last token."""
        eot = np.array([self.eot_id], np.int64)
        # One more token at the end is read for every position after it.
        stream = np.concatenate([eot, *self.text.documents(), eot])
        return stream, (self.text.ends - self.text.starts).cumsum()

"""The evaluation text: whole documents, chosen by bytes, and the windows that they are read in.

Two models can be compared by what they say of the same text. So the text is chosen before there are
tokens or windows, and every one of its tokens is a depth-0 target exactly once.
"""

from __future__ import annotations

import gzip
import lzma
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from data_modules.digests import digest
from data_modules.token_store import TokenFile
from data_modules.windows import WindowBatch


@dataclass(frozen=True, eq=False)
class EvaluationText:
    """N documents of a token file, in the order in which they are read.

    Attributes:
        file: the token file.
        starts: ``[N]`` int64 first token of each.
        ends: ``[N]`` int64 token behind the last one, which is the document's end-of-text token.
        bytes: ``[N]`` int64 UTF-8 bytes of each.
        fingerprint: hex digest of the texts: equal ones are equal texts, whatever the tokenizer.
    """

    file: TokenFile
    starts: np.ndarray
    ends: np.ndarray
    bytes: np.ndarray
    fingerprint: str

    @property
    def n_tokens(self) -> int:
        """End-of-text tokens included."""
        return int((self.ends - self.starts).sum())


COMPRESSED = 4 << 20
"""Bytes of a text, from its start, that compressors are asked about: xz takes seconds for these."""


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9 need for a text, or for the first 4 MiB of it: what a
    model has to beat that knows nothing but the text itself."""
    text = text[:COMPRESSED]
    sizes = {
        "gzip": len(gzip.compress(text, 9, mtime=0)),
        "xz": len(lzma.compress(text, preset=9)),
    }
    return {f"{name}_bits_per_byte": 8 * size / len(text) for name, size in sizes.items()}


def choose(file: TokenFile, n_bytes: int | None) -> EvaluationText:
    """Documents of a split until they hold ``n_bytes``, in the order of their digests.

    That order depends on nothing but the documents, and is no order of theirs: neighbours in a
    corpus are alike. Documents are taken whole; but of a long one that would go over the number,
    only the pieces (of at most 65,536 characters, cut at line ends) up to it.

    Args:
        file: the split.
        n_bytes: at least so many UTF-8 bytes, where the split has them; None for all of it.
    """
    pieces = file.pieces()
    if not len(pieces):
        nothing = np.empty(0, np.int64)
        return EvaluationText(file, nothing, nothing, nothing, digest())
    first = np.flatnonzero(np.diff(pieces["document"], prepend=-1))
    by_digest = np.argsort(pieces["digest"][first], kind="stable")
    place = np.empty(len(first), np.int64)
    place[by_digest] = np.arange(len(first))
    order = np.argsort(place[pieces["document"]], kind="stable")
    if n_bytes is not None:
        held = pieces["bytes"][order].cumsum()
        order = order[: held.searchsorted(n_bytes) + 1]
    taken = pieces[order]
    begins = np.flatnonzero(np.diff(taken["document"], prepend=-1))
    behind = np.append(pieces["start"], file.n_tokens)[order + 1]
    last = np.append(begins[1:], len(taken)) - 1
    return EvaluationText(
        file,
        starts=taken["start"][begins],
        ends=behind[last],
        bytes=np.add.reduceat(taken["bytes"], begins),
        fingerprint=digest(*(name.decode() for name in taken["digest"].tolist())),
    )


class EvaluationWindows(Dataset[WindowBatch]):
    """Maps an array of window numbers to a :class:`WindowBatch`.

    The stream is an end-of-text token, from which the first one is predicted, and the documents one
    after the other. Window i starts at its token i * T, so that every token of a document is a
    depth-0 target once; of depth k all but the first k are. What reaches beyond the stream's end is
    padding, never a target; windows behind the last hold nothing else.

    Args:
        text: the documents.
        seq_len: T.
        depth: D.
        stride: s, places from one depth's target to the next one's.
        eot_id: the end-of-text token.
        document_mask: whether batches carry document ids; every document's first token, which
            nothing before it predicts, is then no target.
        extra: E, tokens of a window behind its T + D + 1.
    """

    def __init__(
        self,
        text: EvaluationText,
        *,
        seq_len: int,
        depth: int,
        stride: int = 1,
        eot_id: int,
        document_mask: bool = False,
        extra: int = 0,
    ) -> None:
        self.text = text
        self.seq_len = seq_len
        self.depth = depth
        self.stride = stride
        self.eot_id = eot_id
        self.document_mask = document_mask
        self.extra = extra
        self._stream: np.ndarray | None = None

    def __len__(self) -> int:
        return -(-self.text.n_tokens // self.seq_len)

    @property
    def n_targets(self) -> int:
        """Targets of depth 0."""
        return self.text.n_tokens - self.document_mask * len(self.text.starts)

    def __getitem__(self, numbers: np.ndarray) -> WindowBatch:
        if self._stream is None:
            self._open()
        assert self._stream is not None
        end = len(self._stream) - 1
        width = self.seq_len + self.stride * self.depth + 1 + self.extra
        at = numbers[:, None] * self.seq_len + np.arange(width)
        inside = np.minimum(at, end)
        texts = torch.from_numpy(self._last.searchsorted(inside).clip(max=len(self._last) - 1))
        # The token before the first document belongs to none.
        documents = (
            torch.from_numpy(np.where(inside == 0, -1, texts)) if self.document_mask else None
        )
        return WindowBatch(
            torch.from_numpy(self._stream[inside].astype(np.int64)),
            self.depth,
            documents,
            torch.from_numpy(at < end),
            texts,
            stride=self.stride,
            extra=self.extra,
        )

    def _open(self) -> None:
        """Each loader worker makes a stream of its own: the text, not the split."""
        tokens, eot = self.file.tokens(), np.array([self.eot_id], self.file.dtype)
        spans = zip(self.text.starts, self.text.ends, strict=True)
        # One more at the end stands for all that is behind it.
        self._stream = np.concatenate([eot, *(tokens[a:b] for a, b in spans), eot])
        # Place in the stream of every document's last token.
        self._last = (self.text.ends - self.text.starts).cumsum()

    @property
    def file(self) -> TokenFile:
        """The token file that the text is in."""
        return self.text.file

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_stream": None}

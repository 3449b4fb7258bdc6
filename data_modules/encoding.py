"""Documents to token ids, piece by piece, in this process or in several."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from data_modules.overlap import LineOverlap
from data_modules.sources.base import Source
from data_modules.splitting import DocumentSplit
from data_modules.tokenizers.base import Tokenizer
from mtp_lightning.errors import UserError

PIECE = 65_536
"""Characters that a long document is encoded by: bounds memory, and lets processes share it."""
BATCH = 1_048_576
"""Characters that are encoded at once."""


class Piece(NamedTuple):
    """A piece of a document: its split, its text, and whether it is the document's first and last
    one."""

    split: str
    text: str
    first: bool
    last: bool


class Encoded(NamedTuple):
    """A piece of a document: its split, ids, UTF-8 bytes, the digest of its text (of the validation
    split alone), and whether it is the document's last one."""

    split: str
    ids: np.ndarray
    n_bytes: int
    digest: bytes
    last: bool


def encoded(split: str, ids: np.ndarray, text: bytes, last: bool) -> Encoded:
    """A piece with its text's digest, where the evaluation text may be chosen by it."""
    # Of the training text nobody asks, and it may have billions.
    name = hashlib.blake2b(text, digest_size=16).hexdigest().encode() if split == "val" else b""
    return Encoded(split, ids, len(text), name, last)


def encode_batch(
    batch: Iterable[Piece], tokenizer: Tokenizer, dtype: np.dtype, overlap: LineOverlap
) -> list[Encoded]:
    """Ids of pieces. ``overlap`` is shown the documents that are one piece.

    Raises:
        UserError: an id that the tokenizer does not have.
    """
    batch, n_ids = list(batch), tokenizer.vocab_size
    found = []
    for piece, ids in zip(batch, tokenizer.encode_batch([p.text for p in batch]), strict=True):
        if piece.first and piece.last:
            overlap.add(piece.split, piece.text)
        if len(ids) and not 0 <= ids.min() <= ids.max() < n_ids:
            raise UserError(
                f"the tokenizer ({tokenizer.kind}) gives ids from {ids.min()} to {ids.max()}, and "
                f"says that it has {n_ids}: its vocab_size must be above them all"
            )
        data = piece.text.encode("utf-8")
        found.append(encoded(piece.split, ids.astype(dtype, copy=False), data, piece.last))
    return found


def batches(split: DocumentSplit, overlap: LineOverlap) -> Iterator[list[Piece]]:
    """Lists of pieces, about BATCH characters each.

    ``overlap`` is shown every document of several pieces on the way: its lines may be cut.
    """
    batch: list[Piece] = []
    size = 0
    for number, (name, document) in enumerate(split):
        require_unicode(document, number, split.source)
        if len(document) > PIECE:
            overlap.add(name, document)
        first = True
        for text, last in pieces(document):
            batch.append(Piece(name, text, first, last))
            first = False
            size += len(text)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def require_unicode(document: str, number: int, source: Source) -> None:
    """Refuse a document of a source that cannot be written as UTF-8.

    Raises:
        UserError: naming its number and the character.
    """
    if document.isascii():
        return
    try:
        document.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"document {number} of {source.name} holds half a character (a lone "
            f"surrogate, U+{ord(document[error.start]):04X}) at character {error.start}, "
            f"which is no Unicode text: mend that document"
        ) from None


def pieces(document: str, limit: int = PIECE) -> Iterator[tuple[str, bool]]:
    """Cuts a long document into pieces of at most ``limit`` characters.

    Cuts lie between a line end and a line that begins without white space, where no tokenizer in
    use would join the two sides, or anywhere if a piece has no such place.
    """
    start = 0
    while len(document) - start > limit:
        end = start + limit
        cut = end
        while (cut := document.rfind("\n", start, cut)) > start:
            if not document[cut - 1].isspace() and not document[cut + 1].isspace():
                break
        end = cut + 1 if cut > start else end
        yield document[start:end], False
        start = end
    yield document[start:], True

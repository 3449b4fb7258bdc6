"""Encodes documents as token ids, piece by piece, in this process or in several."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_modules.overlap import LineOverlap
from data_modules.splitting import DocumentSplit
from data_modules.tokenizers.base import Tokenizer
from mtp_lightning.errors import UserError

PIECE = 65_536
"""Most characters of a piece of a long document: bounds memory, and lets processes share it."""
BATCH = 1_048_576
"""Characters that are encoded in one batch."""


class Piece(NamedTuple):
    """A piece of a document."""

    split: str
    text: str
    first: bool
    last: bool


class Encoded(NamedTuple):
    """An encoded piece, with the number of its UTF-8 bytes and, for validation, the digest of its
    text."""

    split: str
    ids: np.ndarray
    n_bytes: int
    digest: bytes
    last: bool


def encoded_piece(split: str, ids: np.ndarray, text: bytes, last: bool) -> Encoded:
    """A piece with the digest of its text, by which the evaluation text is chosen."""
    # Only the validation text is chosen from, and training may have billions of pieces.
    return Encoded(split, ids, len(text), piece_digest(text) if split == "val" else b"", last)


def piece_digest(text: bytes) -> bytes:
    """Hex digest of a piece's text, for ``token_store.PIECES``."""
    return hashlib.blake2b(text, digest_size=16).hexdigest().encode()


def piece_ids(batch: Sequence[Piece], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of pieces. If the tokenizer puts a space before every text, later pieces of a document
    are without it."""
    before = tokenizer.encode(tokenizer.before_piece)
    texts = [piece.text if piece.first else tokenizer.before_piece + piece.text for piece in batch]
    for piece, ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
        if piece.first:
            yield ids
        else:
            joins = not np.array_equal(ids[: len(before)], before)
            yield tokenizer.encode(piece.text) if joins else ids[len(before) :]


def encode_batch(
    batch: Sequence[Piece], tokenizer: Tokenizer, dtype: np.dtype, overlap: LineOverlap
) -> list[Encoded]:
    """Encodes pieces (:func:`piece_ids`). Documents of a single piece are added to ``overlap``.

    Raises:
        UserError: if the tokenizer returns an id out of its range.
    """
    n_ids = tokenizer.vocab_size
    result = []
    for piece, ids in zip(batch, piece_ids(batch, tokenizer), strict=True):
        if piece.first and piece.last:
            overlap.add(piece.split, piece.text)
        if len(ids) and not 0 <= ids.min() <= ids.max() < n_ids:
            raise UserError(
                f"the tokenizer ({tokenizer.kind}) returns ids from {ids.min()} to {ids.max()} but "
                f"reports {n_ids} ids: its vocab_size must be above its largest id"
            )
        data = piece.text.encode("utf-8")
        result.append(encoded_piece(piece.split, ids.astype(dtype, copy=False), data, piece.last))
    return result


def batches(split: DocumentSplit, overlap: LineOverlap) -> Iterator[list[Piece]]:
    """Lists of pieces, about BATCH characters each. Documents of several pieces are added to
    ``overlap`` here, whole, since a cut may divide a line."""
    batch: list[Piece] = []
    size = 0
    for name, document in split:
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


def pieces(document: str, limit: int = PIECE) -> Iterator[tuple[str, bool]]:
    """Cuts a long document into pieces of at most ``limit`` characters.

    A cut lies between a line end and a line that begins without white space, where no common
    tokenizer joins the two sides; if a piece has no such position, it is cut at the limit.
    """
    start = 0
    while len(document) - start > limit:
        cut = start + limit
        while (cut := document.rfind("\n", start, cut)) > start:
            if not document[cut - 1].isspace() and not document[cut + 1].isspace():
                break
        end = cut + 1 if cut > start else start + limit
        yield document[start:end], False
        start = end
    yield document[start:], True

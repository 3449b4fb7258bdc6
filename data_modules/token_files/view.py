"""A token store whose ids stay in the files of other programs.

The cache keeps the results of one pass over the files: counts, document starts, and the pieces that
an evaluation text is chosen from. The ids are memory-mapped in their own files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_modules.digests import digest
from data_modules.encoding import PIECE, piece_digest, pieces
from data_modules.shards import Shard, ShardedTokens, cut
from data_modules.sources.base import digest_files
from data_modules.splitting import cut_index
from data_modules.store_builder import keep_store, progress
from data_modules.token_files.formats import TokenSource
from data_modules.token_store import FORMAT, PIECES, TokenStore, count_ids, save_array
from data_modules.tokenizers.base import Tokenizer
from mtp_lightning.errors import UserError

log = logging.getLogger(__name__)

UNKNOWN_BYTES = 4
"""Bytes that a token of unknown text counts as, for the size of the evaluation text."""
_BLOCK = 1 << 22  # tokens per step


def open_view(
    train: Sequence[TokenSource],
    val: Sequence[TokenSource] | None,
    *,
    held_out: float,
    tokenizer: Tokenizer,
    cache: Path,
) -> TokenStore:
    """The store of token files, which are scanned if the cache has no result for them.

    Args:
        train: files of the training text, in order.
        val: files of the validation text; None takes the end of the training text, from the first
            document that begins after ``1 - held_out`` of the tokens, or from that token if no
            document begins there.

    Raises:
        UserError: for an id that the tokenizer does not have, or files with and without an index.
    """
    splits = {"train": train} if val is None else {"train": train, "val": val}
    all_files = [file for files in splits.values() for file in files]
    share = held_out if val is None else None
    key = digest(
        "view",
        FORMAT,
        json.dumps(tokenizer.spec(), sort_keys=True),
        PIECE,
        share,
        *(_content(files, cache) for files in splits.values()),
    )

    def write(folder: Path) -> dict[str, Any]:
        texts = {name: scan(files, tokenizer) for name, files in splits.items()}
        if val is None:
            texts = dict(zip(("train", "val"), texts["train"].cut(held_out), strict=True))
        source = {
            "name": "tokens",
            "fingerprint": key,
            "formats": sorted({file.format for file in all_files}),
            "files": {name: len(files) for name, files in splits.items()},
        }
        return _write(folder, texts, tokenizer) | {"source": source, "held_out": share}

    return keep_store(cache, key, write, kind="views", shards=[f.shard for f in all_files])


def _content(files: Sequence[TokenSource], cache: Path) -> str:
    """Digest of the files' contents, order and types; names do not matter."""
    numbered = [(str(i), path) for i, file in enumerate(files) for path in file.files]
    # litdata's index is not in `files`, so the format must enter the digest.
    types = (
        f"{file.format} {file.shard.dtype}" if file.format == "litdata" else file.shard.dtype
        for file in files
    )
    return digest_files(numbered, *types, digest_cache=cache / "digests")


@dataclass(frozen=True)
class ScannedText:
    """Facts about a text from one pass over it: where its tokens are, the index of each document's
    first token (int64), and how often each id occurs (``[V]`` int64)."""

    shards: Sequence[Shard]
    starts: np.ndarray
    counts: np.ndarray

    @property
    def n_tokens(self) -> int:
        return sum(shard.n_tokens for shard in self.shards)

    def cut(self, held_out: float) -> tuple[ScannedText, ScannedText]:
        """The text before the held-out part, and that part; see :func:`open_view`."""
        if self.n_tokens < 2:
            raise UserError(f"{self.shards[0].path} has only one token: give more text")
        cut_token = cut_index(self.n_tokens, 1 - held_out)
        n_documents = int(self.starts.searchsorted(cut_token))
        if n_documents < len(self.starts):
            cut_token = int(self.starts[n_documents])
        before, after = cut(self.shards, cut_token)
        counts = count_ids(ShardedTokens(after), len(self.counts))
        starts = np.union1d([0], self.starts[n_documents:] - cut_token)
        return (
            ScannedText(before, self.starts[:n_documents], self.counts - counts),
            ScannedText(after, starts, counts),
        )


def scan(files: Sequence[TokenSource], tokenizer: Tokenizer) -> ScannedText:
    """Counts a text's ids and finds its documents. An index says where documents start; without an
    index they start after end-of-text tokens."""
    with_index = [file.shard.path for file in files if file.starts is not None]
    without = [file.shard.path for file in files if file.starts is None]
    if with_index and without:
        raise UserError(
            f"{with_index[0]} has an index of its documents and {without[0]} has none: use them in "
            "separate runs, or write one of them again"
        )
    tokens = ShardedTokens([file.shard for file in files])
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    begins = np.cumsum([0, *(file.shard.n_tokens for file in files[:-1])])
    parts = [f.starts + a for f, a in zip(files, begins, strict=True) if f.starts is not None]
    after_eot = True
    with progress("token files looked through", len(tokens), unit=" tokens") as bar:
        for first in range(0, len(tokens), _BLOCK):
            block = tokens[first : first + _BLOCK].astype(np.int64)  # bincount refuses uint64
            _require_known(block, first, tokens, tokenizer)
            counts += np.bincount(block, minlength=len(counts))
            if without:
                eot = block == tokenizer.eot_id
                before = np.concatenate([[after_eot], eot[:-1]])
                parts.append(np.flatnonzero(before & ~eot) + first)
                after_eot = bool(eot[-1])
            bar.update(len(block))
    starts = np.concatenate(parts)
    if without:  # end-of-text tokens at the very beginning end no document
        starts = np.union1d([0], starts[1:])
    else:
        _warn_without_end(tokens, starts, tokenizer)
    return ScannedText(tokens.shards, starts, counts)


def _require_known(
    block: np.ndarray, first: int, tokens: ShardedTokens, tokenizer: Tokenizer
) -> None:
    low, high = int(block.min()), int(block.max())
    if low >= 0 and high < tokenizer.vocab_size:
        return
    index = int(np.flatnonzero((block < 0) | (block >= tokenizer.vocab_size))[0])
    path, position = tokens.locate(first + index)
    raise UserError(
        f"{path} has the id {int(block[index])} at token {position}, and the tokenizer "
        f"({tokenizer.kind}) has ids from 0 to {tokenizer.vocab_size - 1}: set the tokenizer that "
        "made the file, or the type of its ids with data.dtype"
    )


def _warn_without_end(tokens: ShardedTokens, starts: np.ndarray, tokenizer: Tokenizer) -> None:
    """Warns of documents without end-of-text token, which Megatron and litdata write on request."""
    ends = starts[1:1001] - 1
    if len(ends) and (without := int((tokens.windows(ends, 1) != tokenizer.eot_id).sum())):
        log.warning(
            "of the first %d documents %d do not end in the end-of-text token %d: windows run from "
            "one into the next without a mark (data.document_mask=true separates them).",
            len(ends),
            without,
            tokenizer.eot_id,
        )


def _write(folder: Path, texts: dict[str, ScannedText], tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes document starts, validation pieces and tokenizer; returns their ``meta.json``."""
    token_bytes = tokenizer.text_bytes()
    lengths = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
    silent = (texts["val"].counts > 0) & (lengths == 0)
    silent[tokenizer.eot_id] = False
    has_text = not silent.any()
    if not has_text:
        log.warning(
            "the tokenizer (%s) does not know the text of %s of the validation text's ids, so "
            "there are no bits per byte.",
            tokenizer.kind,
            "some" if lengths.any() else "any",
        )
    splits: dict[str, dict[str, int | None]] = {}
    for name, text in texts.items():
        save_array(folder / f"{name}.starts.npy", text.starts)
        splits[name] = {
            "tokens": text.n_tokens,
            "bytes": int(text.counts @ lengths) if has_text else None,
            "documents": len(text.starts),
        }
    rows = _pieces(texts["val"], token_bytes if has_text else None, lengths, tokenizer.eot_id)
    save_array(folder / "val.pieces.npy", np.array(list(rows), PIECES))
    tokenizer.save(folder)
    return {
        "dtype": np.dtype(texts["train"].shards[0].dtype).name,
        "tokenizer": tokenizer.facts(),
        "bytes_defined": has_text,
        "lines_in_training": None,
        "splits": splits,
    }


def _pieces(
    text: ScannedText, token_bytes: Sequence[bytes] | None, lengths: np.ndarray, eot_id: int
) -> Iterator[tuple[int, int, int, bytes]]:
    """Rows of :data:`PIECES` for documents of the validation text that have text. If the bytes of
    the ids (``token_bytes``, with their ``lengths``, ``[V]``) are unknown, pieces have a fixed
    number of tokens, and their digest is a digest of the ids."""
    tokens = ShardedTokens(text.shards)
    edges = pairwise([*text.starts, len(tokens)])
    for number, (start, end) in enumerate(edges):
        ids = tokens[start:end].astype(np.int64)
        text_positions = np.flatnonzero(ids != eot_id)
        if not len(text_positions):
            continue
        ids, start = ids[text_positions[0] : text_positions[-1] + 1], int(start + text_positions[0])
        for first, last in _cuts(ids, token_bytes, lengths):
            part = ids[first:last]
            if token_bytes is None:
                data, size = part.tobytes(), UNKNOWN_BYTES * len(part)
            else:
                data = b"".join(token_bytes[i] for i in part.tolist())
                size = len(data)
            yield number, start + first, size, piece_digest(data)


def _cuts(
    ids: np.ndarray, token_bytes: Sequence[bytes] | None, lengths: np.ndarray
) -> Iterator[tuple[int, int]]:
    """(first token, index after the last token) of the pieces of a document. A piece ends with the
    token at which the document's text would be cut."""
    if token_bytes is None:
        step = PIECE // UNKNOWN_BYTES
        yield from ((i, min(i + step, len(ids))) for i in range(0, len(ids), step))
        return
    ends = np.cumsum(lengths[ids])
    if ends[-1] <= PIECE:
        yield 0, len(ids)
        return
    blocks = (ids[i : i + _BLOCK].tolist() for i in range(0, len(ids), _BLOCK))
    data = b"".join(token_bytes[i] for block in blocks for i in block)
    first = n_bytes = 0
    # Bytes that are not UTF-8 count as characters, so that every byte is in a character.
    for piece, final in pieces(data.decode("utf-8", "surrogateescape")):
        n_bytes += len(piece.encode("utf-8", "surrogateescape"))
        last = len(ids) if final else int(ends.searchsorted(n_bytes)) + 1
        if last > first:
            yield first, last
            first = last

"""Builds token stores: documents of a source -> tokenizer -> packed files."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from data_modules.cache import build_once
from data_modules.digests import digest
from data_modules.encoding import PIECE, Encoded
from data_modules.overlap import LineOverlap
from data_modules.seal import note
from data_modules.shards import Shard
from data_modules.splitting import SPLITS, DocumentSplit
from data_modules.token_store import FORMAT, PIECES, TokenStore, save_array, token_dtype
from data_modules.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from tqdm import tqdm

# Folder of the cache with the names of stores by the keys of tokenizers that were trained for them.
_NAMES = "store_names"


def prepare_tokenizer(tokenizer: Tokenizer, split: DocumentSplit, cache: Path) -> Tokenizer:
    """The tokenizer, trained on the training documents once per cache folder if it needs training.
    Refuses a corpus without text."""
    if not tokenizer.needs_training:
        return tokenizer
    target = cache / "tokenizers" / _key("tokenizer", split.source.fingerprint(), split, tokenizer)

    def build(folder: Path) -> None:
        start = time.perf_counter()
        _tell(f"training the {tokenizer.kind} tokenizer on {split.source.name} ...")
        tokenizer.train(split.documents("train")).save(folder)
        split.source.require_unchanged()
        _tell(f"trained the tokenizer in {time.perf_counter() - start:.1f} s")

    return Tokenizer.load(build_once(target, build))


def prepare_store(
    tokenizer: Tokenizer, split: DocumentSplit, cache: Path, *, workers: int | None = None
) -> tuple[TokenStore, Tokenizer]:
    """The store of a corpus, built if the cache has none, and its tokenizer, trained by
    :func:`prepare_tokenizer` if needed.

    Args:
        workers: processes that encode; the store does not depend on their number. 0 encodes in this
            process; None uses one per core if the corpus has 64 MiB or more, or an unknown size.

    Raises:
        UserError: from the source or the tokenizer, about the user's text.
        OSError: if a file cannot be read or written.
    """
    # An untrained tokenizer's options determine its ids for a given corpus, so the key needs no
    # training. The trained tokenizer has another key, under which the store's name is remembered.
    documents = split.source.fingerprint()
    key = _key("store", documents, split, tokenizer)
    with suppress(OSError):
        name = (cache / _NAMES / key).read_text(encoding="utf-8")
        if name.isalnum() and (cache / "stores" / name).is_dir():
            key = name

    def write(folder: Path) -> dict[str, Any]:
        ready = prepare_tokenizer(tokenizer, split, cache)
        overlap = LineOverlap()
        # Closed before an error is printed: its progress bar would follow the message.
        with closing(_encoded(split, ready, overlap, workers)) as encoded:
            return write_documents(folder, ready, split, encoded, overlap)

    store = keep_store(cache, key, write)
    if not tokenizer.needs_training:
        return store, tokenizer
    # The stored tokenizer is the one that made the ids, even if another was trained since.
    trained = Tokenizer.load(store.folder)
    remembered = cache / _NAMES / _key("store", documents, split, trained)
    with suppress(OSError):  # it only saves time
        if not remembered.exists():
            remembered.parent.mkdir(exist_ok=True)
            remembered.write_text(key, encoding="utf-8")
    return store, trained


def keep_store(
    cache: Path,
    key: str,
    write: Callable[[Path], dict[str, Any]],
    *,
    kind: str = "stores",
    shards: Sequence[Shard] | None = None,
) -> TokenStore:
    """The store of a key, written if the cache has none.

    Args:
        key: hex digest of everything that determines the tokens.
        write: writes the other files into the folder that it receives, and returns ``meta.json``
            except for format, fingerprint and versions.
        shards: for a view, where the tokens are.
    """

    def build(folder: Path) -> None:
        packages = {name: metadata.version(name) for name in ("numpy", "tokenizers")}
        versions = {"python": platform.python_version(), **packages}
        meta = {"format": FORMAT, **write(folder), "fingerprint": key, "versions": versions}
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    return TokenStore(build_once(cache / kind / key, build), shards)


def _key(kind: str, documents: str, split: DocumentSplit, tokenizer: Tokenizer) -> str:
    spec = json.dumps(tokenizer.spec(), sort_keys=True)
    return digest(kind, FORMAT, documents, split.val_fraction, split.seed, spec, PIECE)


def write_documents(
    folder: Path,
    tokenizer: Tokenizer,
    split: DocumentSplit,
    encoded: Iterable[Encoded],
    overlap: LineOverlap,
    *,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Writes the tokenizer and the documents of a store; returns its ``meta.json``, as
    :func:`keep_store` takes it.

    Args:
        encoded: pieces of documents, in order.
        overlap: the line counts, complete once all documents are written.
        vocab_size: upper bound of the ids; by default the tokenizer's own.
    """
    dtype = token_dtype(vocab_size or tokenizer.vocab_size)
    eot = np.array([tokenizer.eot_id], dtype)
    writers = {name: _SplitWriter(folder / f"{name}.bin", eot) for name in SPLITS}
    try:
        for piece in encoded:
            writers[piece.split].add(piece)
    finally:
        for writer in writers.values():
            writer.close()
    note(folder, {writer.path.name: writer.digest.hexdigest() for writer in writers.values()})
    tokenizer.save(folder)
    return {
        "dtype": dtype.name,
        "source": split.source.summary(),
        "tokenizer": tokenizer.facts(),
        "val_fraction": split.val_fraction,
        "split_seed": split.seed,
        "lines_in_training": overlap.share(),
        "splits": {name: writer.facts() for name, writer in writers.items()},
    }


class _SplitWriter:
    """Appends documents to one .bin file and records where they and their pieces start."""

    def __init__(self, path: Path, eot: np.ndarray) -> None:
        self.path = path
        self.eot = eot
        self.file: BinaryIO = path.open("wb", buffering=1 << 20)
        self.digest = hashlib.blake2b(digest_size=16)
        self.n_tokens = 0
        self.n_bytes = 0
        self.starts = array("q", [0])
        # Only evaluation asks for pieces, and training may have billions.
        self.pieces: list[tuple[int, int, int, bytes]] | None = [] if path.stem == "val" else None

    def add(self, piece: Encoded) -> None:
        if self.pieces is not None:
            number = len(self.starts) - 1
            self.pieces.append((number, self.n_tokens, piece.n_bytes, piece.digest))
        self._write(piece.ids.astype(self.eot.dtype, copy=False))
        self.n_bytes += piece.n_bytes
        if piece.last:
            self._write(self.eot)
            self.starts.append(self.n_tokens)

    def _write(self, ids: np.ndarray) -> None:
        self.file.write(ids.data)
        self.digest.update(ids.data)
        self.n_tokens += len(ids)

    def close(self) -> None:
        self.file.close()
        save_array(self.path.with_suffix(".starts.npy"), np.array(self.starts[:-1], np.int64))
        if self.pieces is not None:
            save_array(self.path.with_suffix(".pieces.npy"), np.array(self.pieces, PIECES))

    def facts(self) -> dict[str, int]:
        return {"tokens": self.n_tokens, "bytes": self.n_bytes, "documents": len(self.starts) - 1}


def _encoded(
    split: DocumentSplit, tokenizer: Tokenizer, overlap: LineOverlap, workers: int | None
) -> Generator[Encoded]:
    """The pieces of :func:`encode_documents`, with a progress bar."""
    from data_modules.encoding_pool import encode_documents, pick_workers

    total_bytes = split.source.total_bytes()
    n = pick_workers(workers, tokenizer, total_bytes)
    with progress(f"tokens of {split.source.name} ({tokenizer.kind})", total_bytes) as bar:
        for piece in encode_documents(split, tokenizer, overlap, workers=n):
            yield piece
            bar.update(piece.n_bytes)
        bar.total = bar.n  # of .jsonl, only the field is text
    split.source.require_unchanged()


def progress(description: str, total: int | None, unit: str = "B") -> tqdm:
    """A progress bar on stderr up to ``total``, if that is known; written once a minute if stderr
    is not a terminal."""
    from tqdm import tqdm

    seconds = 0.1 if sys.stderr.isatty() else 60.0
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        mininterval=seconds,
        miniters=1,
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""The LightningDataModule of token files: ids from other programs -> a view -> loaders."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from data_modules.sources.text import Paths, expand, path_list
from data_modules.store_module import StoreDataModule
from data_modules.token_files.formats import TokenSource, read_header
from data_modules.token_files.litdata_chunks import INDEX, chunk_paths
from data_modules.token_files.view import open_view
from data_modules.token_store import TokenStore
from data_modules.tokenizers.base import Tokenizer
from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_number

HELD_OUT = 0.05


class TokenFilesDataModule(StoreDataModule):
    """Windows of T + D + 1 tokens from files that already hold ids; no file is copied.

    Args:
        tokenizer: the one that made the ids, or an :class:`IdTokenizer`.
        path: files of the training text: ``.bin`` or ``.npy`` (Megatron's also without the suffix,
            litdata's also by their ``index.json``), folders, globs, or a list, read as one text.
        val_path: the same for the validation text; None holds out the end of ``path``.
        held_out: share of the tokens to hold out, in whole documents; 0.05 if None.
        dtype: type of the ids in files without header; uint16 if None.
        options: options of :class:`StoreDataModule` and :class:`WindowDataModule`.

    Raises:
        UserError: for numbers out of range, or a tokenizer that needs training; at the first use
            for a damaged or unknown file, a file in both texts, or an id beyond the tokenizer's.
        FileNotFoundError: at the first use, if there is no such file.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        path: Paths,
        val_path: Paths | None = None,
        held_out: float | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if tokenizer.needs_training:
            raise UserError(
                f"data=tokens holds ids, and tokenizer={tokenizer.kind} would have to be trained "
                "on text: set the tokenizer that made them (tokenizer=pretrained "
                "tokenizer.path=...), or tokenizer=ids with tokenizer.vocab_size and "
                "tokenizer.eot_id"
            )
        if held_out is not None:
            require_number("data.held_out (null: 0.05)", held_out, above=0, below=1)
            if val_path is not None:
                raise UserError(
                    f"data.held_out={held_out} has no meaning with data.val_path: leave one out"
                )
        self.path = path
        self.val_path = val_path
        self.held_out = HELD_OUT if held_out is None else held_out
        self.dtype = dtype
        self._tokenizer = tokenizer

    @cached_property
    def opened(self) -> tuple[TokenStore, Tokenizer]:
        train = self._files("data.path", self.path)
        val = None if self.val_path is None else self._files("data.val_path", self.val_path)
        seen, held_out = ({f.shard.path.resolve() for f in files} for files in (train, val or ()))
        if shared := seen & held_out:
            raise UserError(
                f"{min(shared)} is in data.path and in data.val_path: validation must not see "
                "what was trained on"
            )
        store = open_view(
            train, val, held_out=self.held_out, tokenizer=self._tokenizer, cache=self.cache_dir
        )
        return store, self._tokenizer

    def _files(self, key: str, paths: Paths) -> list[TokenSource]:
        unique: dict[Path, Path] = {}
        for path in path_list(paths, key):
            # Megatron names a pair of files without their suffix.
            given, pair = (Path(os.path.expanduser(name)) for name in (path, f"{path}.bin"))
            pattern = str(pair) if pair.is_file() and not given.exists() else path
            files = [file for _, file in expand(pattern, key, text_only=False)]
            # An index says in which order the chunks next to it come.
            for file in sorted(files, key=lambda file: file.name != INDEX):
                for id_file in _id_files(file):
                    unique.setdefault(id_file.resolve(), id_file)
        sources = [read_header(file, self.dtype) for file in unique.values()]
        too_wide = self.dtype is None and self._tokenizer.vocab_size > 1 << 16
        for source in sources:
            if source.format == "raw" and too_wide:
                raise UserError(
                    f"{source.shard.path} does not state the type of its ids, and not all "
                    f"{self._tokenizer.vocab_size:,} ids of the tokenizer have 16 bits: set "
                    "data.dtype=uint32, or data.dtype=uint16 if the file's ids do."
                )
        return sources

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"held_out": self.store.meta["held_out"]}


def _id_files(path: Path) -> list[Path]:
    """The files of ids that an index stands for; any other file stands for itself."""
    if path.suffix == ".idx" and path.with_suffix(".bin").is_file():
        return [path.with_suffix(".bin")]
    chunks = chunk_paths(path) if path.name == INDEX else None
    return [path] if chunks is None else chunks

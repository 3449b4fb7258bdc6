"""The LightningDataModule of text: source + tokenizer -> token store -> loaders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from data_modules.sources.base import Source
from data_modules.splitting import DocumentSplit
from data_modules.store_builder import prepare_store
from data_modules.store_module import StoreDataModule
from data_modules.token_store import TokenStore
from data_modules.tokenizers.base import Tokenizer
from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_whole


class TokenDataModule(StoreDataModule):
    """Windows of T + D + 1 tokens from any source, through a token store that is built once.

    Args:
        source: the corpus.
        tokenizer: a tokenizer, or a bpe tokenizer that is trained here.
        val_fraction: expected share of validation groups (:class:`DocumentSplit`).
        split_seed: seed of the split; runs with different ``seed`` share the split.
        build_workers: processes that encode a new corpus, as in :func:`prepare_store`.
        options: options of :class:`StoreDataModule` and :class:`WindowDataModule`.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        val_fraction: float = 0.05,
        split_seed: int = 0,
        build_workers: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(source, Source):
            raise UserError(f"data.source must be a source of text, not a {type(source).__name__}.")
        if build_workers is not None:
            require_whole("data.build_workers (null: one per core)", build_workers, least=0)
        self.source = source
        for corpus in filter(None, (source, source.held_out)):
            corpus.digest_cache = self.cache_dir / "digests"
        self.build_workers = build_workers
        self.split = DocumentSplit(source, val_fraction=val_fraction, seed=split_seed)
        self._tokenizer = tokenizer

    @classmethod
    def from_text(
        cls,
        paths: str | Sequence[str],
        tokenizer: Tokenizer,
        *,
        field: str = "text",
        val_paths: str | Sequence[str] | None = None,
        **options: Any,
    ) -> TokenDataModule:
        """A data module on the user's own files; ``paths``, ``field`` and ``val_paths`` are those
        of :class:`TextSource`, the other arguments those of the class."""
        from data_modules.sources.text import TextSource

        return cls(TextSource(paths, field=field, val_paths=val_paths), tokenizer, **options)

    @cached_property
    def opened(self) -> tuple[TokenStore, Tokenizer]:
        return prepare_store(
            self._tokenizer, self.split, self.cache_dir, workers=self.build_workers
        )

    def summary(self) -> dict[str, Any]:
        split = {key: self.store.meta[key] for key in ("val_fraction", "split_seed")}
        return super().summary() | split

"""Small token stores."""

from __future__ import annotations

import json
from pathlib import Path

from data_modules.sources.base import Source
from data_modules.splitting import DocumentSplit
from data_modules.store_builder import prepare_store
from data_modules.token_store import TokenStore
from data_modules.tokenizers import ByteTokenizer


class Listed(Source):
    """Documents from a list."""

    name = "listed"

    def __init__(self, documents: list[str]) -> None:
        self.listed = documents

    def documents(self):
        return iter(self.listed)

    def fingerprint(self) -> str:
        return json.dumps(self.listed)


def store_of(documents: list[str], folder: Path, tokenizer=None, **options) -> TokenStore:
    split = DocumentSplit(Listed(documents), **options)
    return prepare_store(tokenizer or ByteTokenizer(), split, folder, workers=0)[0]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

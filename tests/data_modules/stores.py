"""Small sources of text and token stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_modules.sources import TextSource
from data_modules.sources.base import Source
from data_modules.splitting import DocumentSplit
from data_modules.store_builder import prepare_store
from data_modules.token_store import TokenStore
from data_modules.tokenizers import ByteTokenizer


class ListSource(Source):
    """Documents from a list, as a user writes a source; ``read`` counts those that were read."""

    name = "listed"

    def __init__(self, documents: list[str]) -> None:
        self.texts = documents
        self.read = 0

    def documents(self):
        for document in self.texts:
            self.read += 1
            yield document

    def fingerprint(self) -> str:
        return json.dumps(self.texts)


def assert_refused(match: str, *paths: object, error: Any = ValueError, **options) -> None:
    """Checks that reading the documents of these files raises an error with this message."""
    with pytest.raises(error, match=match):
        list(TextSource(list(paths), **options).documents())


def store_of(documents: list[str], folder: Path, tokenizer=None, **options) -> TokenStore:
    split = DocumentSplit(ListSource(documents), **options)
    return prepare_store(tokenizer or ByteTokenizer(), split, folder, workers=0)[0]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

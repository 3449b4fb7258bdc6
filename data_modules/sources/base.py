"""The interface of a source of text, and the functions that sources share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from data_modules.digests import content_digest, digest
from mtp_lightning.errors import UserError


class Source(ABC):
    """A corpus: documents in a fixed order.

    Construction is cheap, since Hydra builds sources from the config; files are read, and mistakes
    reported, when documents or the fingerprint are asked for.
    """

    name: str
    """Short name for tables and log lines."""
    held_out: Source | None = None
    """The documents for validation, if they are a corpus of their own."""
    digest_cache: Path | None = None
    """Folder that remembers the digests of large files; the owner of a cache sets it."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Yields the documents. Their order, and so each document's index, never changes."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that changes whenever the documents or their groups may have changed."""

    def require_unchanged(self) -> None:  # noqa: B027
        """Refuses documents that have changed since :meth:`fingerprint`; sources of files do."""

    def grouped(self) -> Iterator[tuple[str, str]]:
        """Yields (group, document): the documents in order, near copies with the same group.

        A group goes whole to training or validation. By default a document's own text is its group,
        which keeps exact copies together; a source that knows more, such as the project or the
        author of its documents, overrides this.
        """
        return ((document, document) for document in self.documents())

    def total_bytes(self) -> int | None:
        """About how many UTF-8 bytes the documents have; ``None`` if unknown."""
        return None

    def summary(self) -> dict[str, Any]:
        """Plain facts about the corpus, for the run's summary."""
        return {"name": self.name, "fingerprint": self.fingerprint()}


class FileSource(Source):
    """A corpus in files on disk, which are found once."""

    @property
    @abstractmethod
    def files(self) -> list[tuple[str, Path]]:
        """(name that does not depend on the place, path) of every file, in order."""

    @property
    @abstractmethod
    def rules(self) -> tuple[object, ...]:
        """Everything besides the files that decides the documents; part of the fingerprint."""

    @cached_property
    def _fingerprint(self) -> str:
        return digest_files(self.files, *self.rules, digest_cache=self.digest_cache)

    def fingerprint(self) -> str:
        return self._fingerprint

    def require_unchanged(self) -> None:
        before = self._fingerprint
        del self._fingerprint
        if self._fingerprint != before:
            raise UserError(f"a file of {self.name!r} was changed while it was read: start again.")

    def total_bytes(self) -> int | None:
        return sum(path.stat().st_size for _, path in self.files)


def digest_files(
    files: Iterable[tuple[str, Path]], *options: object, digest_cache: Path | None = None
) -> str:
    """Hex digest of options and of every file's name, size and content.

    Args:
        files: (name that enters the digest, path) in a fixed order.
        options: everything else that decides the documents.
        digest_cache: see :func:`~data_modules.digests.content_digest`.
    """
    parts: list[object] = list(options)
    for name, path in files:
        parts += [name, *content_digest(path, digest_cache)]
    return digest(*parts)


def decode_utf8(data: bytes, where: str, *, offset: int = 0) -> str:
    """The text of UTF-8 bytes, which begin at ``offset`` of the file ``where``.

    Raises:
        UserError: for other bytes, with the first one's place.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        utf_16 = offset == 0 and data[:2] in (BOM_UTF16_LE, BOM_UTF16_BE)
        remedy = f"`iconv -f {'UTF-16' if utf_16 else 'LATIN1'} -t UTF-8` converts a text"
        if b"\0" in data and not utf_16:
            remedy = "it holds zero bytes, which no text has: leave it out"
        raise UserError(
            f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at byte offset "
            f"{offset + error.start} ({error.reason}); {remedy}"
        ) from None


def require_unicode(document: str, name: str) -> None:
    """Refuses a document that cannot be written as UTF-8, as JSON may hold one."""
    if document.isascii():
        return
    try:
        document.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} holds half a character (a lone surrogate, U+{ord(document[error.start]):04X}) "
            f"at character {error.start}, which is not Unicode text: fix that document"
        ) from None

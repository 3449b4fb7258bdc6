"""Train and validation documents: which is which."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from itertools import islice

from data_modules.sources.base import Source

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
SMALL = 64
"""Corpora of up to this many documents are given a validation document if the hash gives none."""


class DocumentSplit:
    """Sends every document of a source to train or validation, whole.

    A document is a validation document if a hash of (split seed, its index), read as a fraction,
    lies below ``val_fraction``: adding documents at the end moves none of the others. In a corpus
    of up to 64 documents where that leaves a split empty, the document of the smallest hash goes
    to validation, or the one of the largest to train.

    A corpus of **one document** is cut into two, so that a user's first own text, often one file,
    can be trained on: its first part, up to the line end nearest before ``1 - val_fraction`` of
    the characters, is the training document and the rest the validation document.

    Args:
        source: the corpus. Empty documents are dropped before they are counted.
        val_fraction: expected share of validation documents, between 0 and 1.
        seed: of the hash. Not the run's seed: runs with other seeds share the split.

    Raises:
        ValueError: if ``val_fraction`` is not between 0 and 1.
    """

    def __init__(self, source: Source, *, val_fraction: float = 0.05, seed: int = 0) -> None:
        if not 0 < val_fraction < 1:
            raise ValueError(
                f"data.val_fraction must lie between 0 and 1, both excluded, got {val_fraction}"
            )
        self.source = source
        self.val_fraction = val_fraction
        self.seed = seed
        self._exceptions: dict[int, str] | None = None
        self._cut = False

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yields (split, document), in the source's order.

        Raises:
            ValueError: if the source has no text.
        """
        self._look()
        assert self._exceptions is not None
        for index, document in enumerate(nonempty(self.source)):
            if self._cut:
                at = cut_point(document, 1 - self.val_fraction)
                yield "train", document[:at]
                yield "val", document[at:]
            else:
                yield self._exceptions.get(index) or self.of(index), document

    def of(self, index: int) -> str:
        """Split of document ``index`` by the hash alone."""
        return "val" if self.hash(index) < self.val_fraction else "train"

    def hash(self, index: int) -> float:
        """Hash of (seed, index) as a fraction in [0, 1)."""
        data = f"{self.seed}:{index}".encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64

    def documents(self, split: str) -> Iterator[str]:
        """The documents of one split."""
        return (document for name, document in self if name == split)

    def _look(self) -> None:
        """Finds out once whether this is a corpus of one document, or a small one."""
        if self._exceptions is not None:
            return
        n = sum(1 for _ in islice(nonempty(self.source), SMALL + 1))
        if n == 0:
            raise ValueError(
                f"the corpus {self.source.name!r} has no text: every document is empty"
            )
        self._exceptions = {}
        if n == 1:
            self._cut = True
            log.info(
                "the corpus %r is one document: its last %.3g %% are the validation document",
                self.source.name,
                100 * self.val_fraction,
            )
        elif n <= SMALL:
            if all(self.of(i) == "train" for i in range(n)):
                self._exceptions = {min(range(n), key=self.hash): "val"}
            elif all(self.of(i) == "val" for i in range(n)):
                self._exceptions = {max(range(n), key=self.hash): "train"}


def nonempty(source: Source) -> Iterator[str]:
    """The documents of a source that hold text (datasets have empty rows)."""
    return (document for document in source.documents() if document)


def cut_point(document: str, fraction: float) -> int:
    """Where to cut one document in two: after the last line end before ``fraction`` of it.

    If there is none in the second half of what comes before, the cut is exactly there.
    """
    at = min(max(1, round(len(document) * fraction)), max(1, len(document) - 1))
    line_end = document.rfind("\n", at // 2, at)
    return line_end + 1 if line_end >= 0 else at

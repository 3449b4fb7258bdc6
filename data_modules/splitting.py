"""Train and validation documents: which is which."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from functools import cached_property

from data_modules.sources.base import Source
from mtp_lightning.errors import UserError

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
SMALL = 64
"""Corpora of up to this many groups are given one for validation if the hash gives none."""


class DocumentSplit:
    """Sends every group of a source's documents to train or validation, whole.

    The source says which documents belong together (:meth:`Source.grouped`), at least those of
    the same text: what is validated on is then no copy of what was trained on. A group is for
    validation if a hash of (split seed, group), read as a fraction, lies below ``val_fraction``:
    adding documents moves none of the others. In a corpus of up to 64 groups where that leaves a
    split empty, the group of the smallest hash goes to validation, or the one of the largest to
    train.

    The documents of a corpus of **one group** are cut into two, so that a user's first own text,
    often one file, can be trained on: the first part, up to the line end nearest before
    ``1 - val_fraction`` of the characters, is the training document and the rest the validation
    document.

    Args:
        source: the corpus. Empty documents are dropped before they are counted.
        val_fraction: expected share of validation groups, between 0 and 1.
        seed: of the hash. Not the run's seed: runs with other seeds share the split.

    Raises:
        UserError: if ``val_fraction`` is not between 0 and 1.
    """

    def __init__(self, source: Source, *, val_fraction: float = 0.05, seed: int = 0) -> None:
        if not 0 < val_fraction < 1:
            raise UserError(
                f"data.val_fraction must lie between 0 and 1, both excluded, got {val_fraction}"
            )
        self.source = source
        self.val_fraction = val_fraction
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yields (split, document), in the source's order.

        Raises:
            UserError: if the source has no text.
        """
        below = self._below
        for group, document in nonempty(self.source):
            if below is None:
                at = cut_point(document, 1 - self.val_fraction)
                yield "train", document[:at]
                yield "val", document[at:]
            else:
                yield "val" if self.hash(group) < below else "train", document

    def hash(self, group: str) -> float:
        """Hash of (seed, group) as a fraction in [0, 1)."""
        # Texts that are no Unicode have their own error message, from who encodes them.
        value = hashlib.blake2b(f"{self.seed}:".encode(), digest_size=8)
        value.update(group.encode("utf-8", "surrogatepass"))
        return int.from_bytes(value.digest(), "big") / 2**64

    def documents(self, split: str) -> Iterator[str]:
        """The documents of one split."""
        return (document for name, document in self if name == split)

    @cached_property
    def _below(self) -> float | None:
        """Groups whose hashes lie below this are for validation; ``None``: there is one group."""
        hashes: set[float] = set()
        for group, _ in nonempty(self.source):
            hashes.add(self.hash(group))
            if len(hashes) > SMALL:
                return self.val_fraction
        if not hashes:
            raise UserError(f"the corpus {self.source.name!r} has no text: every document is empty")
        if len(hashes) == 1:
            log.info(
                "the documents of %r are one group: the last %.3g %% of each are for validation",
                self.source.name,
                100 * self.val_fraction,
            )
            return None
        order = sorted(hashes)
        # Above the smallest hash and not above the largest: neither split is empty.
        return min(max(self.val_fraction, order[1]), order[-1])


def nonempty(source: Source) -> Iterator[tuple[str, str]]:
    """(group, document) of the documents that hold text (datasets have empty rows)."""
    return ((group, document) for group, document in source.grouped() if document)


def cut_point(document: str, fraction: float) -> int:
    """Where to cut one document in two: after the last line end before ``fraction`` of it.

    If there is none in the second half of what comes before, the cut is exactly there.
    """
    at = min(max(1, round(len(document) * fraction)), max(1, len(document) - 1))
    line_end = document.rfind("\n", at // 2, at)
    return line_end + 1 if line_end >= 0 else at

"""Splits documents into training and validation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

from data_modules.sources.base import Source, require_unicode
from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_number

log = logging.getLogger(__name__)

SPLITS = ("train", "val")


@dataclass(eq=False)
class DocumentSplit:
    """Sends every group of a source's documents (:meth:`Source.grouped`) whole to training or
    validation, so that no validation document is a copy of a training document.

    A group is for validation if a hash of (split seed, group), read as a fraction, lies below
    ``val_fraction``: adding documents moves none of the others. If that leaves a split empty, the
    group with the smallest hash goes to validation, or the one with the largest to training.

    The documents of a corpus of **one group**, such as a single file, are cut in two: the first
    part, up to the last line end before ``1 - val_fraction`` of the characters, is the training
    document, and the rest is the validation document.

    A corpus whose validation documents are given (:attr:`Source.held_out`) is not split.
    """

    source: Source  # the corpus; empty documents are dropped before counting
    _: KW_ONLY
    # Expected share of validation groups; ``UserError`` unless between 0 and 1.
    val_fraction: float = 0.05
    seed: int = 0  # of the hash, not of the run: runs with different seeds share the split

    def __post_init__(self) -> None:
        require_number("data.val_fraction", self.val_fraction, above=0, below=1)
        if self.source.held_out is None:
            return
        fraction = ("val_fraction", self.val_fraction, DocumentSplit.val_fraction)
        for key, value, default in (fraction, ("split_seed", self.seed, DocumentSplit.seed)):
            if value != default:
                raise UserError(
                    f"data.{key}={value} chooses validation documents, and data.val_paths names "
                    "them: leave one of the two out."
                )

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yields (split, document), in the source's order; refuses a source without text and a
        document that cannot be written as UTF-8."""
        if self.source.held_out is not None:
            for name, source in zip(SPLITS, (self.source, self.source.held_out), strict=True):
                for _, document in _documents(source):
                    yield name, document
            return
        bound = self._val_bound
        for group, document in _documents(self.source):
            if bound is None:
                cut = cut_point(document, 1 - self.val_fraction)
                yield "train", document[:cut]
                if cut < len(document):  # one character cannot be cut
                    yield "val", document[cut:]
            else:
                yield "val" if self.hash(group) < bound else "train", document

    def hash(self, group: str) -> float:
        """Hash of (seed, group) as a fraction in [0, 1)."""
        # The name of a group may be that of a file, which need not be Unicode.
        value = hashlib.blake2b(f"{self.seed}:".encode(), digest_size=8)
        value.update(group.encode("utf-8", "surrogatepass"))
        return int.from_bytes(value.digest(), "big") / 2**64

    def documents(self, split: str) -> Iterator[str]:
        """The documents of one split."""
        return (document for name, document in self if name == split)

    @cached_property
    def _val_bound(self) -> float | None:
        """Groups with a hash below this are for validation; ``None`` if there is only one group."""
        hashes: set[float] = set()
        smallest, largest = 1.0, 0.0
        for group, _ in _documents(self.source):
            value = self.hash(group)
            hashes.add(value)
            smallest, largest = min(smallest, value), max(largest, value)
            if smallest < self.val_fraction <= largest:
                return self.val_fraction
        if len(hashes) == 1:
            log.info(
                "%r is one document, or one group: the last %.3g %% of each are for validation",
                self.source.name,
                100 * self.val_fraction,
            )
            return None
        order = sorted(hashes)
        # Above the smallest hash and at most the largest, so that neither split is empty.
        return min(max(self.val_fraction, order[1]), order[-1])


def _documents(source: Source) -> Iterator[tuple[str, str]]:
    """(group, document) of the documents that hold text; datasets have empty rows. A corpus without
    text is refused."""
    has_text = False
    for number, (group, document) in enumerate(source.grouped()):
        if document:
            has_text = True
            require_unicode(document, f"document {number} of {source.name}")
            yield group, document
    if not has_text:
        raise UserError(f"the corpus {source.name!r} has no text: every document is empty")


def cut_point(document: str, fraction: float) -> int:
    """Where to cut one document in two: after the last line end before ``fraction`` of it, or
    exactly there if the second half of that part has no line end."""
    cut = cut_index(len(document), fraction)
    line_end = document.rfind("\n", cut // 2, cut)
    return line_end + 1 if line_end >= 0 else cut


def cut_index(n: int, fraction: float) -> int:
    """The index nearest to ``fraction`` of n at which neither part is empty."""
    return min(max(1, round(n * fraction)), max(1, n - 1))

"""How much of the validation text also stands in the training text: counted by long lines."""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b

LONG = 32
"""Characters from which on a stripped line counts: shorter ones recur in any text of a kind."""
LIMIT = 2**18
"""Lines of a split that are remembered, so some 50 MB at most for the two."""


class LineOverlap:
    """Counts, one document after the other, which validation lines stand in training documents.

    A line counts if it has at least 32 characters without the white space around it, as often as
    it stands in the validation documents. Only hashes of 64 bits are kept. When one of the splits
    has more than ``limit`` different ones, those in the upper half of the range are forgotten on
    both sides, and from then on not looked at: of equal lines all are kept or none. So the share
    is exact for up to ``limit`` different lines a split, and beyond that an estimate from a sample
    of them. It does not depend on the order of the documents.

    Args:
        limit: hashes that are kept of each split.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._below = 2**64
        self._train: set[int] = set()
        self._val: Counter[int] = Counter()

    def add(self, split: str, document: str) -> None:
        """Counts a document of ``train`` or ``val``; its text must be encodable as UTF-8."""
        lines = (line.strip() for line in document.splitlines())
        hashes = (_hash(line) for line in lines if len(line) >= LONG)
        kept = (value for value in hashes if value < self._below)
        (self._val if split == "val" else self._train).update(kept)
        while max(len(self._train), len(self._val)) > self.limit:
            self._below //= 2
            self._train = {value for value in self._train if value < self._below}
            self._val = Counter({v: n for v, n in self._val.items() if v < self._below})

    def share(self) -> float | None:
        """Validation lines that are training lines, too, by all of them; ``None`` without any."""
        total = self._val.total()
        shared = sum(n for value, n in self._val.items() if value in self._train)
        return shared / total if total else None


def _hash(line: str) -> int:
    return int.from_bytes(blake2b(line.encode("utf-8"), digest_size=8).digest(), "big")

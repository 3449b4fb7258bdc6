"""How much of the validation text also stands in the training text: counted by long lines."""

from __future__ import annotations

import re
from hashlib import blake2b

LONG = 32
"""Characters from which on a stripped line counts: shorter ones recur in any text of a kind."""
LINE = re.compile(rf"[^\n]{{{LONG},}}")
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
        self._counts: dict[str, dict[int, int]] = {"train": {}, "val": {}}

    def add(self, split: str, document: str) -> None:
        """Counts a document of ``train`` or ``val``; its text must be encodable as UTF-8."""
        counts = self._counts[split]
        # One line at a time: a document may be the whole corpus.
        for match in LINE.finditer(document):
            line = match.group().strip()
            if len(line) >= LONG and (value := _hash(line)) < self._below:
                counts[value] = counts.get(value, 0) + 1
                if len(counts) > self.limit:
                    self._forget()
                    counts = self._counts[split]

    def merge(self, other: LineOverlap) -> None:
        """Adds what another one has counted, of other documents: as if one had seen them all."""
        self._below = min(self._below, other._below)
        for split, counts in self._counts.items():
            for value, n in other._counts[split].items():
                counts[value] = counts.get(value, 0) + n
            self._counts[split] = {v: n for v, n in counts.items() if v < self._below}
        self._forget()

    def _forget(self) -> None:
        """Halves the sample until both splits are within the limit."""
        while max(map(len, self._counts.values())) > self.limit:
            self._below //= 2
            self._counts = {
                split: {value: n for value, n in counts.items() if value < self._below}
                for split, counts in self._counts.items()
            }

    def share(self) -> float | None:
        """Validation lines that are training lines, too, by all of them; ``None`` without any."""
        train, val = self._counts["train"], self._counts["val"]
        shared = sum(n for value, n in val.items() if value in train)
        return shared / sum(val.values()) if val else None


def _hash(line: str) -> int:
    return int.from_bytes(blake2b(line.encode("utf-8"), digest_size=8).digest(), "big")

"""How much of the validation text also occurs in the training text, counted by long lines."""

from __future__ import annotations

import re
from collections import Counter
from hashlib import blake2b

LONG = 32
"""Least characters of a line that counts, stripped: shorter lines recur in any similar text."""
LINE = re.compile(rf"[^\n]{{{LONG},}}")
LIMIT = 2**18
"""Lines remembered per split: about 50 MB at most for both splits."""


class LineOverlap:
    """Counts, one document at a time, the validation lines that also occur in training documents.

    A line counts if it has at least 32 characters without surrounding white space, as often as it
    occurs in the validation documents. Only 64-bit hashes are kept. When a split has more than
    :data:`LIMIT` different hashes, both splits drop those in the upper half of the range for good,
    so equal lines are kept in both splits or in neither. From then on the share is estimated from a
    sample. It does not depend on the order of the documents.
    """

    def __init__(self) -> None:
        self._below = 2**64
        self._counts: dict[str, Counter[int]] = {"train": Counter(), "val": Counter()}

    def add(self, split: str, document: str) -> None:
        """Counts a document of ``train`` or ``val``; its text must be valid UTF-8."""
        counts = self._counts[split]
        # One line at a time: a document may be the whole corpus.
        for match in LINE.finditer(document):
            line = match.group().strip()
            if len(line) < LONG:
                continue
            value = int.from_bytes(blake2b(line.encode("utf-8"), digest_size=8).digest(), "big")
            if value < self._below:
                counts[value] += 1
                if len(counts) > LIMIT:
                    self._forget()
                    counts = self._counts[split]

    def merge(self, other: LineOverlap) -> None:
        """Adds the counts of another object, which saw other documents."""
        self._below = min(self._below, other._below)
        for split, counts in self._counts.items():
            counts.update(other._counts[split])
        self._forget()

    def _forget(self) -> None:
        """Drops hashes out of range, which is halved until both splits are within the limit."""
        while True:
            for split, counts in self._counts.items():
                self._counts[split] = Counter({v: n for v, n in counts.items() if v < self._below})
            if max(map(len, self._counts.values())) <= LIMIT:
                return
            self._below //= 2

    def share(self) -> float | None:
        """Share of validation lines that are also training lines; ``None`` if there are none."""
        train, val = self._counts["train"], self._counts["val"]
        shared = sum(n for value, n in val.items() if value in train)
        return shared / sum(val.values()) if val else None

"""Seeded Markov text of any size, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from data_modules.digests import digest
from data_modules.sources.base import Source
from mtp_lightning.settings import require_whole

SUCCESSORS = 16
"""Words that can follow a word, with probabilities 1/2, 1/4, ..., so the text is learnable."""


class SyntheticSource(Source):
    """``documents`` documents of invented words, about ``size`` UTF-8 bytes together.

    A first-order Markov chain writes them: each of the ``words`` words is followed by one of 16
    with probabilities that halve from the first to the last. The same arguments give the same bytes
    with every numpy version (raw Philox bits).
    """

    name = "synthetic"

    def __init__(
        self, *, size: int = 1_000_000, documents: int = 200, words: int = 512, seed: int = 0
    ) -> None:
        require_whole("data.source.documents", documents, least=1)
        require_whole("data.source.size (16 bytes for each document)", size, least=16 * documents)
        require_whole("data.source.words", words, least=2)
        require_whole("data.source.seed", seed, least=0)
        self.size = size
        self.n_documents = documents
        self.words = words
        self.seed = seed

    def documents(self) -> Iterator[str]:
        bits = np.random.Philox(np.random.SeedSequence([self.seed, self.words]))
        vocabulary = _invent(bits, self.words)
        follow = (bits.random_raw(self.words * SUCCESSORS) % self.words).astype(np.int64)
        follow = follow.reshape(self.words, SUCCESSORS)
        mean = sum(map(len, vocabulary)) / self.words + 1.1
        length = max(1, round(self.size / self.n_documents / mean))
        group = max(1, min(256, 4_000_000 // length))
        for start in range(0, self.n_documents, group):
            n = min(group, self.n_documents - start)
            chain = np.empty((length, n), np.int64)
            state = (bits.random_raw(n) % self.words).astype(np.int64)
            for i in range(length):
                chain[i] = state
                # Leading zero bits of a random number: 0, 1, 2, ... with probability 1/2, 1/4, ...
                raw = bits.random_raw(n) >> np.uint64(64 - SUCCESSORS + 1)
                rank = SUCCESSORS - 1 - np.frexp(raw.astype(np.float64))[1]
                state = follow[state, rank]
            for column in chain.T:
                words = [vocabulary[word] for word in column.tolist()]
                sentences = (words[i : i + 12] for i in range(0, length, 12))
                yield "".join(" ".join(sentence) + ".\n" for sentence in sentences)

    def fingerprint(self) -> str:
        return digest("synthetic 1", self.size, self.n_documents, self.words, self.seed)

    def total_bytes(self) -> int:
        return self.size

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"seed": self.seed}


def _invent(bits: np.random.Philox, n: int) -> list[str]:
    """n words of one to three syllables; two of them may be the same."""
    onsets, vowels = "bdfgklmnprstvz", "aeiou"
    words = []
    for raw in bits.random_raw(n).tolist():
        syllables = 1 + raw % 3
        raw //= 3
        word = ""
        for _ in range(syllables):
            raw, onset = divmod(raw, len(onsets))
            raw, vowel = divmod(raw, len(vowels))
            word += onsets[onset] + vowels[vowel]
        words.append(word)
    return words

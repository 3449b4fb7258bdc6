"""The order of an epoch's windows, a pure function of (number of windows, seed, epoch)."""

from __future__ import annotations

import math

import numpy as np

LARGE = 2**26
"""Number of windows above which the order is computed on the fly instead of held in memory."""
_ROUNDS = 8


def window_order(n: int, *, seed: int, epoch: int) -> np.ndarray | FeistelOrder:
    """The permutation of 0 .. n - 1 for an epoch, read by slices: sorted random keys up to
    :data:`LARGE` windows, a keyed permutation above."""
    kind = epoch_order if n <= LARGE else FeistelOrder
    return kind(n, seed=seed, epoch=epoch)


def epoch_order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """``[n]`` permutation of the windows for one epoch: the order of raw Philox numbers, whose
    stream numpy promises never to change, unlike that of ``Generator.permutation``."""
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable")


class FeistelOrder:
    """A keyed permutation that needs no memory: each entry is computed on its own.

    An index is written as a pair (left, right) with ``left < a``, ``right < b``, ``a b >= n``. In
    every round a keyed hash of one half is added to the other, modulo a or b. Every round can be
    undone, so together they permute the a b pairs; a result of n or more is enciphered again until
    it is below n, which permutes 0 .. n - 1 (generalized Feistel cipher with cycle walking: Black &
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). The keys come from Philox. There
    are at most 2**62 windows.
    """

    def __init__(self, n: int, *, seed: int, epoch: int) -> None:
        self.n = n
        root = math.isqrt(max(n, 1) - 1) + 1
        self._a, self._b = np.uint64(root), np.uint64(-(-max(n, 1) // root))
        self._keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(_ROUNDS)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, indices: slice) -> np.ndarray:
        """``[k]`` int64 windows at the indices of a slice."""
        numbers = np.arange(*indices.indices(self.n)).astype(np.uint64)
        todo = np.arange(len(numbers))
        while len(todo):
            numbers[todo] = self._encipher(numbers[todo])
            todo = todo[numbers[todo] >= self.n]
        return numbers.astype(np.int64)

    def _encipher(self, indices: np.ndarray) -> np.ndarray:
        left, right = np.divmod(indices, self._b)
        for i, key in enumerate(self._keys):
            if i % 2 == 0:
                left = (left + _hash(right, key) % self._a) % self._a
            else:
                right = (right + _hash(left, key) % self._b) % self._b
        return left * self._b + right


def _hash(half: np.ndarray, key: np.uint64) -> np.ndarray:
    """64 bits that each depend on all of (half, key): splitmix64 (Steele et al. 2014)."""
    x = half + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

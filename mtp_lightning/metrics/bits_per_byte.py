"""Bits per byte, which compares across tokenizers, and its standard error.

Shapes: N documents of the evaluation text.
"""

from __future__ import annotations

import math

import numpy as np


def bits_per_byte(nats_N: np.ndarray, bytes_N: np.ndarray) -> float:
    """Summed loss of the evaluated targets over the bytes of the same targets.

    Args:
        nats_N: summed loss of each document.
        bytes_N: UTF-8 bytes of its targets.
    """
    return float(nats_N.sum() / math.log(2) / bytes_N.sum())


def bits_per_byte_se(
    nats_N: np.ndarray, bytes_N: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> float:
    """Standard error of :func:`bits_per_byte` by a bootstrap over documents (Efron 1979): how much
    another sample of as many documents would change it.

    It measures how well this text represents its corpus. The difference of two models on the same
    text varies far less.
    """
    generator = np.random.default_rng(seed)
    n = len(nats_N)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = generator.integers(n, size=n)
        means[i] = bits_per_byte(nats_N[drawn], bytes_N[drawn])
    return float(means.std(ddof=1))

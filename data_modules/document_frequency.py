"""How many documents hold each token id."""

from __future__ import annotations

import numpy as np

from data_modules.token_store import TokenFile

_BLOCK = 1 << 20  # tokens per step; a longer document is a step of its own


def document_frequency(file: TokenFile, vocab_size: int) -> np.ndarray:
    """``[vocab_size]`` int64 documents of a split that hold each id, end-of-text tokens included.

    Args:
        file: the split.
        vocab_size: number of ids of its tokenizer.
    """
    tokens, starts = file.tokens(), file.starts()
    edges = np.append(starts, file.n_tokens)
    holding = np.zeros(vocab_size, np.int64)
    first = 0
    while first < len(starts):
        last = max(int(edges.searchsorted(edges[first] + _BLOCK, side="right")) - 1, first + 1)
        sizes = np.diff(edges[first : last + 1])
        owner = np.repeat(np.arange(last - first), sizes)
        block = tokens[edges[first] : edges[last]].astype(np.int64)
        # One number for each pair of document and id, counted once.
        pairs = np.unique(owner * vocab_size + block)
        holding += np.bincount(pairs % vocab_size, minlength=vocab_size)
        first = last
    return holding

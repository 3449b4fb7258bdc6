"""Compares a cell's greedy texts with those of plain decoding.

Shapes: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mtp_lightning.certify.cells import RESUMED, Cell
from mtp_lightning.certify.texts import DecodedText, decode
from mtp_lightning.model import MTPModel


@dataclass
class Greedy:
    """The comparison of a cell's greedy texts with plain decoding."""

    texts: int = 0  # compared texts
    texts_equal: int = 0  # texts with the same tokens
    first_difference: tuple[int, int] | None = None  # text and token; None without one
    tokens: int = 0  # compared tokens, including the first different one of a text
    logits_equal: int = 0  # tokens whose logits are all equal to the last bit
    largest_difference: float = 0.0  # between two logits of one token

    def compare(self, number: int, wanted: DecodedText, decoded: DecodedText, start: int) -> None:
        """Count a cell's text, which begins at token ``start`` of plain decoding's."""
        ids = wanted.ids[start : start + len(decoded.ids)]
        pairs = zip(ids, decoded.ids, strict=True)
        fork = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        self.texts += 1
        self.texts_equal += fork is None
        if fork is not None and self.first_difference is None:
            self.first_difference = number, start + fork
        # The logits compare up to the first different token, where both have read the same.
        T = len(ids) if fork is None else fork + 1
        a_TV, b_TV = wanted.logits_TV[start : start + T], decoded.logits_TV[:T]
        self.tokens += T
        same_TV = a_TV.contiguous().view(torch.uint8) == b_TV.contiguous().view(torch.uint8)
        self.logits_equal += int(same_TV.all(dim=-1).sum())
        difference = float((a_TV - b_TV).abs().max())
        self.largest_difference = max(self.largest_difference, difference)

    def try_on(
        self,
        model: MTPModel,
        cell: Cell,
        beginnings: Sequence[Sequence[int]],
        wanted: Sequence[DecodedText],
        *,
        first: int,
    ) -> None:
        """Decode prompts as a cell does, and count the results; ``wanted`` are plain decoding's
        texts, and ``first`` is the number of the first prompt."""
        length = len(wanted[0].ids)
        start = length // 2 if cell.reads == RESUMED else 0
        prefixes = [[*ids, *text.ids[:start]] for ids, text in zip(beginnings, wanted, strict=True)]
        # In a batch, the texts end at different times.
        spread = 1 if cell.batch == 1 else max((length - start) // 2, 1)
        lengths = [length - start - i % spread for i in range(len(prefixes))]
        decoded = decode(model, cell, prefixes, lengths)
        for i, (plain, theirs) in enumerate(zip(wanted, decoded, strict=True)):
            self.compare(first + i, plain, theirs, start)

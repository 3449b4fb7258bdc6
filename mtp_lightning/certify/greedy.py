"""Greedy texts of a cell, compared with those of plain decoding.

Shapes: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mtp_lightning.certify.cells import RESUMED, Cell
from mtp_lightning.certify.texts import Text, decode, threads
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.model import MTPModel


@dataclass
class Greedy:
    """What the greedy texts of a cell showed.

    Attributes:
        texts: how many were compared.
        equal: how many of them are those of plain decoding, token for token.
        tokens: how many tokens were compared, a text's first different one included.
        same_bits: at how many of them all logits are those of plain decoding, to the last bit.
        largest: the largest difference between two logits of one token.
        first: the first different text, by its number, and the token in it where it parts.
    """

    texts: int = 0
    equal: int = 0
    tokens: int = 0
    same_bits: int = 0
    largest: float = 0.0
    first: tuple[int, int] | None = None

    def compare(self, number: int, wanted: Text, found: Text, start: int) -> None:
        """Count a text.

        Args:
            number: of the text.
            wanted: plain decoding's.
            found: the cell's, which begins at token ``start`` of the other.
        """
        ids = wanted.ids[start : start + len(found.ids)]
        pairs = zip(ids, found.ids, strict=True)
        parts = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        self.texts += 1
        self.equal += parts is None
        if parts is not None and self.first is None:
            self.first = number, start + parts
        # Up to there both have read the same tokens.
        T = len(ids) if parts is None else parts + 1
        a_TV, b_TV = wanted.logits_TV[start : start + T], found.logits_TV[:T]
        self.tokens += T
        self.same_bits += int((a_TV == b_TV).all(dim=-1).sum())
        self.largest = max(self.largest, float((a_TV - b_TV).abs().max()))


def plain_texts(model: MTPModel, beginnings: Sequence[Sequence[int]], length: int) -> list[Text]:
    """Plain decoding of one text at a time on one thread: the reference."""
    plain = DecodingOptions(speculative=False, batch_size=1)
    with threads(1):
        return decode(model, plain, beginnings, [length] * len(beginnings))


def compare_texts(
    model: MTPModel,
    cell: Cell,
    beginnings: Sequence[Sequence[int]],
    wanted: Sequence[Text],
    into: Greedy,
    *,
    first: int,
) -> None:
    """Decode prompts by a cell and count them.

    Args:
        model: on its device.
        cell: how.
        beginnings: the prompts.
        wanted: their texts by :func:`plain_texts`.
        into: where they are counted.
        first: the number of the first prompt.
    """
    length = len(wanted[0].ids)
    start = length // 2 if cell.reads == RESUMED else 0
    read = [[*ids, *text.ids[:start]] for ids, text in zip(beginnings, wanted, strict=True)]
    # In a batch the rows end at different times, and others take their places.
    spread = range(1) if cell.batch == 1 else range(max((length - start) // 2, 1))
    lengths = [length - start - i % len(spread) for i in range(len(read))]
    with threads(cell.threads):
        found = decode(model, replace(cell.options, batch_size=cell.batch), read, lengths)
    for i, (mine, other) in enumerate(zip(wanted, found, strict=True)):
        into.compare(first + i, mine, other, start)

"""The results of all cells, as a table, as JSON and as a badge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mtp_lightning.certify.cells import WHOLE, Cell
from mtp_lightning.certify.greedy import Greedy
from mtp_lightning.certify.others import Count
from mtp_lightning.certify.sampled import Sampled
from mtp_lightning.errors import counted

# The probability that samples call a lossless model broken, over all cells together.
_FALSE_ALARM = 1e-4
_LINE = "{:<8} {:<11} {:>5} {:>15} {:>17} {:>11} {:>11}"  # of the table
_BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" \
aria-label="{left}: {right}">
<rect rx="3" width="{width}" height="20" fill="#444"/>
<rect rx="3" x="62" width="{rest}" height="20" fill="{color}"/>
<g fill="#fff" font-family="Verdana,sans-serif" font-size="11">
<text x="6" y="14">{left}</text><text x="68" y="14">{right}</text>
</g>
</svg>
"""


@dataclass
class Row:
    """A cell in one precision of the weights: the comparison of its greedy texts, and the test of
    its sampled ones, which may be none."""

    precision: str
    cell: Cell
    greedy: Greedy = field(default_factory=Greedy)
    sampled: Sampled = field(default_factory=Sampled)


@dataclass
class Certificate:
    """The results of a model."""

    model: str  # its path
    facts: dict[str, Any]  # machine, versions and settings
    same_bits: bool  # whether logits are promised to be equal to the last bit on this machine
    rows: list[Row] = field(default_factory=list)  # the cells with their results
    # Counts for other programs, if they were asked for; these programs promise nothing.
    others: list[Count] = field(default_factory=list)
    # Whether prompts give the same bits whole and split in two. With latent attention or experts
    # they do not, with or without drafts, since PyTorch's products round differently for other
    # numbers of rows.
    prompts_alike: bool = True

    @property
    def least_p(self) -> float:
        """The smallest p-value that a cell's samples may have (Bonferroni)."""
        return _FALSE_ALARM / max(sum(row.sampled.tokens > 0 for row in self.rows), 1)

    def promises_bits(self, cell: Cell) -> bool:
        """Whether equal logits are promised in a cell, and not only equal texts."""
        return self.same_bits and (self.prompts_alike or cell.reads == WHOLE)

    def broken(self) -> list[str]:
        """The broken promises, one sentence each."""
        sentences = []
        for row in self.rows:
            cell, greedy = row.cell, row.greedy
            where = (
                f"{row.precision}, drafts: {cell.drafts}, batch {cell.batch}, "
                f"{counted(cell.threads, 'thread')}, {cell.reads} prefix"
            )
            if greedy.first_difference is not None:
                text, token = greedy.first_difference
                sentences.append(
                    f"{where}: {greedy.texts - greedy.texts_equal:,} of {greedy.texts:,} greedy "
                    f"texts differ, text {text} first, from its token {token} on"
                )
            elif self.promises_bits(cell) and greedy.logits_equal < greedy.tokens:
                sentences.append(
                    f"{where}: the logits of {greedy.tokens - greedy.logits_equal:,} of "
                    f"{greedy.tokens:,} tokens differ, by up to {greedy.largest_difference:.1e}"
                )
            if row.sampled.tokens and row.sampled.p < self.least_p:
                sentences.append(
                    f"{where}: {row.sampled.tokens:,} sampled tokens do not follow the trunk's "
                    f"distribution (p = {row.sampled.p:.0e})"
                )
        return sentences

    def verdict(self) -> str:
        """The result in one sentence."""
        total, ps = _total(self.rows)
        text = (
            f"{total.texts_equal:,} of {total.texts:,} greedy texts in {len(self.rows)} cells are "
            "plain decoding's"
        )
        if total.logits_equal == total.tokens:
            text += ", all logits to the last bit"
        elif any(self.promises_bits(row.cell) for row in self.rows) and not self.broken():
            text += ", all logits to the last bit where prompts are read whole"
        elif not self.same_bits:
            text += (
                f", {total.logits_equal:,} of {total.tokens:,} logits to the last bit (guaranteed "
                "only with the C++ for CPUs)"
            )
        if ps:
            text += f"; the least p of {len(ps)} chi-square tests of samples is {min(ps):.2g}"
        if all(row.cell.drafts in ("none", "looked up") for row in self.rows):
            text += "; the model has no heads that draft"
        return f"{'BROKEN' if self.broken() else 'lossless'}: {text}."

    def lines(self) -> Iterator[str]:
        """A table with one line per precision and way of drafting, and the verdict."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.precision, row.cell.drafts), []).append(row)
        yield _LINE.format(
            "weights", "drafts", "cells", "texts equal", "logits equal", "difference", "samples: p"
        )
        for (precision, drafts), rows in groups.items():
            total, ps = _total(rows)
            texts = f"{total.texts_equal:,}/{total.texts:,}"
            logits = f"{total.logits_equal:,}/{total.tokens:,}"
            difference = f"{largest:.1e}" if (largest := total.largest_difference) else "0"
            least_p = f"{min(ps):.2g}" if ps else ""
            columns = (precision, drafts, len(rows), texts, logits, difference, least_p)
            yield _LINE.format(*columns).rstrip()
        for count in self.others:
            way = f"{count.program}, {count.weights}, {count.way}"
            yield f"{way}: {count.texts_equal:,}/{count.texts:,} texts equal its plain ones"
        yield from self.broken()
        yield self.verdict()

    def to_json(self) -> dict[str, Any]:
        """The certificate as data for JSON."""
        return {
            "model": self.model,
            "verdict": self.verdict(),
            "broken": self.broken(),
            **self.facts,
            "prompts": max((row.greedy.texts for row in self.rows), default=0),
            "logits_promised_to_the_last_bit": self.same_bits,
            "prompts_read_alike": self.prompts_alike,
            "cells": [_row_json(row) for row in self.rows],
            "others": [asdict(count) for count in self.others],
        }

    def badge(self) -> str:
        """An SVG badge for a model card."""
        texts = _total(self.rows)[0].texts
        right = "broken" if self.broken() else f"{texts:,} of {texts:,} texts"
        rest = 14 + 7 * len(right)
        color = "#b3261e" if self.broken() else "#1a7f37"
        return _BADGE.format(left="lossless", right=right, width=62 + rest, rest=rest, color=color)


def _total(rows: Sequence[Row]) -> tuple[Greedy, list[float]]:
    """The greedy texts of several cells, and the p-values of their samples."""
    counts = [row.greedy for row in rows]
    total = Greedy(
        texts=sum(count.texts for count in counts),
        texts_equal=sum(count.texts_equal for count in counts),
        tokens=sum(count.tokens for count in counts),
        logits_equal=sum(count.logits_equal for count in counts),
        largest_difference=max((count.largest_difference for count in counts), default=0.0),
    )
    return total, [row.sampled.p for row in rows if row.sampled.tokens]


def _row_json(row: Row) -> dict[str, Any]:
    cell, sampled = row.cell, row.sampled
    fields = {
        "weights": row.precision,
        "drafts": cell.drafts,
        "batch": cell.batch,
        "threads": cell.threads,
        "prefix": cell.reads,
        **asdict(row.greedy),
    }
    if not sampled.tokens:
        return fields
    numbers = {"sampled_tokens": sampled.tokens, "chi_square": sampled.chi_square, "p": sampled.p}
    return fields | numbers

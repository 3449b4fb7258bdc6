"""The ways of decoding that are compared with plain decoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from mtp_lightning.decoding.options import MOST_DRAFTS, DecodingOptions
from mtp_lightning.decoding.tree import Tree
from mtp_lightning.decoding.verification import RULES
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel

WHOLE, RESUMED = "whole", "resumed"
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way of decoding."""

    drafts: str  # the name of ``options`` in the table
    options: DecodingOptions  # how tokens are drafted
    batch: int = 1  # texts decoded together; in a batch, texts join others and end before them
    threads: int = 1  # of PyTorch
    # ``whole`` continues the prompt; ``resumed`` continues prompt and half of the text after
    # reading both again.
    reads: str = WHOLE


# The reference: plain decoding of one text at a time on one thread.
PLAIN = Cell(drafts="none", options=DecodingOptions(speculative=False))


def ways(model: MTPModel) -> dict[str, DecodingOptions]:
    """The ways of drafting that a model is capable of, by name; the first is plain decoding."""
    depth, vocab = min(model.depth, MOST_DRAFTS), model.config.trunk.vocab_size
    levels = model.mtp.max_draft_depth  # None for any number
    candidates = {
        PLAIN.drafts: PLAIN.options,
        **{f"depth {k}": DecodingOptions(draft_depth=k) for k in sorted({1, 2, 4, depth} - {0})},
        "deeper": DecodingOptions(draft_depth=min(depth + 2, MOST_DRAFTS)),
        "one cache": DecodingOptions(draft_depth=min(depth + 1, MOST_DRAFTS), cache="single"),
        "auto": DecodingOptions(draft_depth="auto"),
        "tree": DecodingOptions(tree=Tree((3, 2)[: 2 if levels is None else max(levels, 1)])),
        "short head": DecodingOptions(draft_vocab=max(vocab // 4, 1)),
        **{rule: DecodingOptions(verify=rule) for rule in RULES if rule != "token"},
        "confident": DecodingOptions(min_confidence=0.5),
        "looked up": DecodingOptions(lookup=6),
    }
    possible: dict[str, DecodingOptions] = {}
    for name, options in candidates.items():
        try:
            drafted = options.max_draft(model) or options.lookup
        except UserError:  # this model cannot draft that way
            continue
        # "deeper" may equal one of the depths before it.
        if (name == "none" or drafted) and options not in possible.values():
            possible[name] = options
    return possible


def cells(model: MTPModel, threads: tuple[int, ...], *, few: bool = False) -> Iterator[Cell]:
    """The cells of a model, on each number of ``threads``: the product of all ways, or with ``few``
    only those that differ from one text on one thread in at most one way besides drafts."""
    rest = tuple(itertools.product((1, BATCH), threads, (WHOLE, RESUMED)))
    for name, options in ways(model).items():
        for batch, n, reads in rest:
            changed = (batch != 1) + (n != threads[0]) + (reads != WHOLE)
            if (changed or name != PLAIN.drafts) and (changed <= 1 or not few):
                yield Cell(drafts=name, options=options, batch=batch, threads=n, reads=reads)

"""Chooses prompts, and decodes them with the logits from which every token was chosen.

Shapes: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.certify.cells import Cell
from mtp_lightning.decoding.adaptive import AutoDepth
from mtp_lightning.decoding.engine import Engine
from mtp_lightning.decoding.options import Request
from mtp_lightning.decoding.sequence import TextSequence
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.runtime import threads

Prompts = Sequence[Sequence[int]]
# Characters that are enough for a prompt's tokens.
_SLICE = 400
_SHORTEST, _LONGEST = 4, 32


@dataclass
class DecodedText:
    """The tokens of a decoded text, and the trunk's logits [T, V] from which they were chosen,
    in parts, one per round."""

    ids: list[int] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)

    @cached_property
    def logits_TV(self) -> Tensor:
        """The logits from which the tokens were chosen, once the text is finished."""
        return torch.cat(self.parts)


def prompts(
    tokenizer: Any, count: int, *, longest: int, seed: int, file: Path | None
) -> list[list[int]]:
    """Cut ``count`` short prompts from random places of a text.

    Args:
        longest: most tokens of a prompt.
        file: the text; None for the modules of Python's standard library, or for random tokens of
            a model that reads no text, such as a task's.

    Raises:
        UserError: the file is too short or not UTF-8.
    """
    from data_modules.sources.stdlib import StdlibSource

    chance = random.Random(seed)
    shortest, longest = min(_SHORTEST, longest), min(_LONGEST, longest)
    if file is None and not tokenizer.reads_text:
        lengths = [chance.randint(shortest, longest) for _ in range(count)]
        return [chance.choices(range(tokenizer.vocab_size), k=length) for length in lengths]
    files = [path for _, path in StdlibSource().files] if file is None else [file]
    beginnings: list[list[int]] = []
    read_text = cache(partial(Path.read_text, encoding="utf-8"))
    for _ in range(20 * count + 100):
        path = chance.choice(files)
        try:
            text = read_text(path)
        except UnicodeDecodeError as error:
            if file is None:
                continue
            raise UserError(f"{file} is not UTF-8: {error}; convert it.") from error
        start = chance.randrange(max(len(text) - _SLICE, 1))
        ids = list(tokenizer.encode(text[start : start + _SLICE]))
        length = chance.randint(shortest, longest)
        if len(ids) >= length:
            beginnings.append([int(token) for token in ids[:length]])
        if len(beginnings) == count:
            return beginnings
    source = file or "The standard library"
    raise UserError(f"{source} holds too little text for {count} prompts: give a longer --text.")


def decode(
    model: MTPModel,
    cell: Cell,
    beginnings: Prompts,
    lengths: Sequence[int],
    *,
    first: int = 0,
    **sampling: Any,
) -> list[DecodedText]:
    """Decode texts from their ``beginnings`` as a cell does.

    Args:
        lengths: new tokens of each text; no token ends a text earlier.
        first: the number of the first text, on which its random numbers depend.
        sampling: ``temperature`` and ``seed``, for texts that are not greedy.
    """
    texts = [DecodedText() for _ in beginnings]

    def keep(index: int, logits_TV: Tensor) -> None:
        texts[index - first].parts.append(logits_TV.clone())

    options = replace(cell.options, batch_size=cell.batch, eot_id=-1, **sampling)
    requests = [
        replace(options.request(ids, first + i), max_new_tokens=length)
        for i, (ids, length) in enumerate(zip(beginnings, lengths, strict=True))
    ]
    depths = _EachInTurn(options.max_draft(model)) if options.draft_depth == "auto" else None
    with threads(cell.threads), Engine(model, options, on_logits=keep, depths=depths) as engine:
        for sequence in _run(engine, requests):
            texts[sequence.request.index - first].ids = sequence.token_ids
    return texts


def _run(engine: Engine, requests: Sequence[Request]) -> Iterator[TextSequence]:
    """Decode requests. Half of a batch begins, and the others join it two rounds later."""
    n = -(-engine.slots // 2)
    yield from engine.add(requests[:n])
    for _ in range(2):
        yield from engine.step()
    yield from engine.run(requests[n:])


class _EachInTurn(AutoDepth):
    """Takes each number of drafts in turn. Which one ``"auto"`` takes depends on times, and it
    changes too seldom for short texts."""

    _n_rounds = 0

    def depth(self, rows: int, room: int | None = None) -> int:
        self._n_rounds += 1
        return self._n_rounds % (self.max_draft + 1)

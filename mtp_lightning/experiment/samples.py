"""Prints a trained model's continuations of held-out text when a run ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import StringIO
from itertools import islice
from typing import TYPE_CHECKING, Any

from mtp_lightning.command_line.shell import printable
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.options import Prompt
from mtp_lightning.decoding.sequence import Fresh
from mtp_lightning.experiment.text_stream import Colors, TextStream, wants_colors
from mtp_lightning.model import MTPModel

if TYPE_CHECKING:
    from data_modules import WindowDataModule

# Beginnings that a reader recognizes: a function, a class, the first words of a sentence.
_FUNCTION = re.compile(r"^ *(?:async )?def \w+\([^()\n]*\)[^\n:]*:\n", re.MULTILINE)
_CLASS = re.compile(r"^class \w+[^\n:]*:\n", re.MULTILINE)
_SENTENCE = re.compile(r"(?<!\w)[A-Z][a-z]+(?:[ ][a-z]+,?){4,6}(?= [a-z])")
_SAMPLES, _NEW_TOKENS, _TEMPERATURE = 3, 60, 0.7
_SEARCHED, _PIECE = 1000, 64  # pieces of held-out text that are searched, and tokens per piece


def print_samples(model: MTPModel, data: WindowDataModule, *, seed: int) -> None:
    """Print the model's continuations of three held-out beginnings, or its answer to a question of
    a task."""
    if model.config.mtp.answers_at_once:
        return
    try:
        if data.answer_length is not None:
            _print_answer(model, data, data.answer_length)
        else:
            _print_texts(model, data, seed)
    except ValueError as error:
        print(f"no sample: {error}")


def _print_answer(model: MTPModel, data: WindowDataModule, length: int) -> None:
    (prompt,) = data.held_out_prompts(1, data.seq_len)
    sizes: dict[str, Any] = {"max_new_tokens": length, "max_context": data.seq_len}
    (answer,) = generate(model, [prompt], tokenizer=data.tokenizer, long="slide", **sizes)
    question = printable(data.tokenizer.decode(prompt.tolist()))
    print("Sample (a held-out question >> the model's answer)")
    print(f"{question} >>{printable(answer.text or '')}\n")


def _print_texts(model: MTPModel, data: WindowDataModule, seed: int) -> None:
    pieces = data.held_out_prompts(_SEARCHED, min(_PIECE, data.seq_len), fewer=True)
    texts = [data.tokenizer.decode(piece.tolist()) for piece in pieces]
    prompts: list[tuple[str, Prompt]] = [
        (kind, data.tokenizer.encode(text)) for kind, text in beginnings(texts)
    ]
    if not prompts:
        prompts = [("a text", piece) for piece in pieces[:1]]
    # Color codes would be unreadable in a file or a pipe.
    marks = Colors() if wants_colors() and model.mtp.max_draft_depth != 0 else None
    streams = [
        TextStream(
            data.tokenizer,
            StringIO(),
            data.tokenizer.decode([int(token) for token in prompt]),
            terminal=True,  # a job's log, too, is read in a terminal
            marks=marks,
        )
        for _, prompt in prompts
    ]

    def add(i: int, fresh: Fresh) -> None:
        # Rejected drafts would make the text hard to read; generate.py show_drafts=true shows them.
        streams[i].add(fresh._replace(rejected=[[] for _ in fresh.token_ids]))

    generations = generate(
        model,
        [prompt for _, prompt in prompts],
        max_new_tokens=_NEW_TOKENS,
        temperature=_TEMPERATURE,
        seed=seed,
        tokenizer=data.tokenizer,
        max_context=data.seq_len,
        long="slide",
        on_tokens=add,
    )
    legend = ""
    if marks is not None:
        legend = f"; {marks.legend(len(generations[0].drafts_reached), rejected=False)}"
    print(f"Samples (held-out beginnings, temperature {_TEMPERATURE:g}{legend})")
    for (kind, _), stream, generation in zip(prompts, streams, generations, strict=True):
        stream.end(generation)
        print(f"--- {kind}\n{stream.out.getvalue()}")  # type: ignore[attr-defined]


def beginnings(texts: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the kind and text of up to three beginnings: ``a function``, ``a class`` and ``a
    sentence``, the first of each. More sentences take the place of missing code."""
    missing = _SAMPLES
    for kind, pattern in (("a function", _FUNCTION), ("a class", _CLASS)):
        if match := next(filter(None, map(pattern.search, texts)), None):
            yield kind, match[0]
            missing -= 1
    sentences = filter(None, map(_SENTENCE.search, texts))
    yield from (("a sentence", match[0]) for match in islice(sentences, missing))

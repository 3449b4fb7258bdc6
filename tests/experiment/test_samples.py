"""The samples that a run prints at its end."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_modules.tokenizers import ByteTokenizer
from mtp_lightning.experiment.samples import beginnings, print_samples
from tests.decoding.models import small_model

CODE = (
    "# Copyright 1990-2020\n",
    "import os\n\n\nclass Job(Base):\n    size = 3\n",
    "    def run(self, n: int) -> None:\n        return 5\n",
    "# It takes the name of a file and writes it.\n",
)


def data(*texts: str) -> Any:
    tokenizer = ByteTokenizer()
    pieces = [tokenizer.encode(text) for text in texts]
    return SimpleNamespace(
        tokenizer=tokenizer,
        seq_len=256,
        answer_length=None,
        held_out_prompts=lambda n, length, fewer: [torch.tensor(p[:length]) for p in pieces][:n],
    )


def test_beginnings_are_a_function_a_class_and_a_sentence() -> None:
    assert list(beginnings(list(CODE))) == [
        ("a function", "    def run(self, n: int) -> None:\n"),
        ("a class", "class Job(Base):\n"),
        ("a sentence", "It takes the name of a file"),
    ]
    prose = [
        f"{word} went to the sea and came back again. Then" for word in ("He", "She", "It", "Ann")
    ]
    assert [kind for kind, _ in beginnings(prose)] == ["a sentence"] * 3
    assert list(beginnings(["0 1 2 3", "\u6570\u636e"])) == []


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("depth", [2, 0])
def test_samples_mark_their_drafts_on_a_terminal(monkeypatch, capsys, depth, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    model = small_model(3, depth, vocab=257)
    print_samples(model, data(*CODE), seed=1)
    output = capsys.readouterr().out
    kinds = re.findall(r"^--- (.*)$", output, re.MULTILINE)
    assert kinds == ["a function", "a class", "a sentence"]
    assert "temperature 0.7" in output and "class Job(Base):\n" in output
    marked = depth > 0 and terminal
    assert ("drafts of depth" in output) == ("\x1b[32m" in output) == marked
    assert ";9m" not in output  # no rejected ones
    print_samples(model, data("0 1\x07 2"), seed=1)
    assert "--- a text\n0 1\\x07 2" in capsys.readouterr().out

"""Prompts of a corpus: which tokens, of which split, and all different."""

from __future__ import annotations

import pytest

from data_modules.prompts import take_prompts
from data_modules.splitting import DocumentSplit
from data_modules.tokenizers import ByteTokenizer
from tests.data_modules.stores import Listed


def texts(prompts) -> list[tuple[str, str]]:
    return [(name, bytes(ids.tolist()).decode()) for name, ids in prompts]


def corpus(n: int = 40, length: int = 30) -> list[str]:
    return [f"{i:03d}:" + "abcdefghij"[i % 10] * (length - 4) for i in range(n)]


def test_beginnings_first_and_each_on_its_documents_side() -> None:
    split = DocumentSplit(Listed(corpus()), val_fraction=0.25)
    sides = {name: list(split.documents(name)) for name in ("train", "val")}
    counts = {"train": 5, "val": 3}
    found = texts(take_prompts(split, ByteTokenizer(), counts=counts, length=8))
    assert found == [(n, d[:8]) for n in ("train", "val") for d in sides[n][: counts[n]]]


def test_then_what_follows_and_never_the_same_twice() -> None:
    split = DocumentSplit(Listed(corpus()), val_fraction=0.25)
    sides = {name: list(split.documents(name)) for name in ("train", "val")}
    n = len(sides["val"])
    counts = {"train": 1, "val": n + 2}
    found = texts(take_prompts(split, ByteTokenizer(), counts=counts, length=8))[1:]
    assert [t for _, t in found[:n]] == [d[:8] for d in sides["val"]]
    # The further parts are one letter each: those of a document with the same one are passed over.
    further = list(dict.fromkeys(d[8:16] for d in sides["val"]))
    assert [t for _, t in found[n:]] == further[:2]


def test_a_prompt_that_stands_on_both_sides_is_taken_once() -> None:
    header = "# the same header of every file.\n"
    assert len(header) == 33
    split = DocumentSplit(Listed([header[1:] + d for d in corpus()]), val_fraction=0.25)
    counts = {"train": 10, "val": 4}
    found = texts(take_prompts(split, ByteTokenizer(), counts=counts, length=16))
    assert [n for n, _ in found] == ["train"] * 10 + ["val"] * 4
    prompts = [t for _, t in found]
    assert len(set(prompts)) == 14
    assert prompts.count(header[1:17]) == prompts.count(header[17:33]) == 1


def test_no_more_is_read_than_is_needed() -> None:
    source = Listed(corpus(5000))
    split = DocumentSplit(source, val_fraction=0.25)
    take_prompts(split, ByteTokenizer(), counts={"train": 3, "val": 3}, length=8)
    assert source.read < 300  # the split looks at 65 groups, too


def test_too_few_and_what_is_no_text() -> None:
    split = DocumentSplit(Listed(corpus(6)), val_fraction=0.25)
    with pytest.raises(ValueError, match=r"validation documents of listed hold only \d+ different"):
        take_prompts(split, ByteTokenizer(), counts={"train": 1, "val": 500}, length=8)
    with pytest.raises(ValueError, match=r"training documents of listed hold only 0 different"):
        take_prompts(split, ByteTokenizer(), counts={"train": 1, "val": 1}, length=31)
    bad = DocumentSplit(Listed(["\ud800" + d for d in corpus(6)]), val_fraction=0.25)
    with pytest.raises(ValueError, match="half a character"):
        take_prompts(bad, ByteTokenizer(), counts={"train": 1, "val": 1}, length=4)

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


def taken(split: DocumentSplit, train: int, val: int, length: int) -> list[tuple[str, str]]:
    """Prompts of either side: its name, and the text."""
    counts = {"train": train, "val": val}
    return texts(take_prompts(split, ByteTokenizer(), counts=counts, length=length))


def split_of(documents: list[str]) -> DocumentSplit:
    return DocumentSplit(Listed(documents), val_fraction=0.25)


def test_beginnings_first_then_what_follows_and_never_the_same_twice() -> None:
    split = split_of(corpus())
    train, val = (list(split.documents(name)) for name in ("train", "val"))
    n = len(val)
    found = taken(split, 5, n + 2, 8)
    assert found[: n + 5] == [("train", d[:8]) for d in train[:5]] + [("val", d[:8]) for d in val]
    # The further parts are one letter each: those of a document with the same one are passed over.
    further = list(dict.fromkeys(d[8:16] for d in val))
    assert [t for _, t in found[n + 5 :]] == further[:2]


def test_a_prompt_that_stands_on_both_sides_is_taken_once() -> None:
    header = "# the same header of every file.\n"
    assert len(header) == 33
    found = taken(split_of([header[1:] + d for d in corpus()]), 10, 4, 16)
    assert [n for n, _ in found] == ["train"] * 10 + ["val"] * 4
    prompts = [t for _, t in found]
    assert len(set(prompts)) == 14
    assert prompts.count(header[1:17]) == prompts.count(header[17:33]) == 1


def test_no_more_is_read_than_is_needed() -> None:
    split = split_of(corpus(5000))
    taken(split, 3, 3, 8)
    assert split.source.read < 300  # the split looks at 65 groups, too


def test_too_few_and_what_is_no_text() -> None:
    few, broken = split_of(corpus(6)), split_of(["\ud800" + d for d in corpus(6)])
    for split, asked, said in (
        (few, (1, 500, 8), r"validation documents of listed hold only \d+ different"),
        (few, (1, 1, 31), "training documents of listed hold only 0 different"),
        (broken, (1, 1, 4), "half a character"),
    ):
        with pytest.raises(ValueError, match=said):
            taken(split, *asked)

"""Prompts from a corpus: their tokens and splits, without repetitions."""

from __future__ import annotations

from functools import partial

import pytest
import tokenizers

from data_modules import encoding, prompts
from data_modules.prompts import take_prompts
from data_modules.splitting import DocumentSplit
from data_modules.tokenizers import ByteTokenizer, PretrainedTokenizer
from tests.data_modules.stores import ListSource


def corpus(n: int = 40, length: int = 30) -> list[str]:
    return [f"{i:03d}:" + "abcdefghij"[i % 10] * (length - 4) for i in range(n)]


def prompts_of(split: DocumentSplit, train: int, val: int, length: int) -> list[tuple[str, str]]:
    """(split, text) of the prompts."""
    counts = {"train": train, "val": val}
    prompts = take_prompts(split, ByteTokenizer(), counts=counts, length=length)
    return [(name, bytes(ids.tolist()).decode()) for name, ids in prompts]


def split_of(documents: list[str]) -> DocumentSplit:
    return DocumentSplit(ListSource(documents), val_fraction=0.25)


def test_prompts_are_beginnings_then_later_parts_without_repetitions() -> None:
    split = split_of(corpus())
    train, val = (list(split.documents(name)) for name in ("train", "val"))
    n = len(val)
    prompts = prompts_of(split, 5, n + 2, 8)
    assert prompts[: n + 5] == [("train", d[:8]) for d in train[:5]] + [("val", d[:8]) for d in val]
    # Later parts are one repeated letter, so documents of the same letter give one prompt.
    further = list(dict.fromkeys(d[8:16] for d in val))
    assert [t for _, t in prompts[n + 5 :]] == further[:2]


def test_a_prompt_in_both_splits_is_taken_once() -> None:
    header = "# the same header of every file.\n"
    assert len(header) == 33
    prompts = prompts_of(split_of([header[1:] + d for d in corpus()]), 10, 4, 16)
    assert [n for n, _ in prompts] == ["train"] * 10 + ["val"] * 4
    only_texts = [t for _, t in prompts]
    assert len(set(only_texts)) == 14
    assert only_texts.count(header[1:17]) == only_texts.count(header[17:33]) == 1


def test_a_beginning_of_several_pieces_has_the_ids_of_the_text(tmp_path, monkeypatch) -> None:
    """The tokenizer puts a space before every text, which later pieces do not have."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=99, special_tokens=["</s>"], show_progress=False
    )
    lines = [f"line {i} of {i % 7}{' or' * (i % 3)}\n" for i in range(200)]
    library.train_from_iterator(lines[:5], trainer)  # no token joins two lines
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = PretrainedTokenizer(str(tmp_path))
    monkeypatch.setattr(prompts, "pieces", partial(encoding.pieces, limit=500))
    document = "".join(lines)
    whole = tokenizer.encode(document)
    assert prompts._beginning(document, tokenizer, len(whole)).tolist() == whole.tolist()


def test_only_the_needed_documents_are_read() -> None:
    split = split_of(corpus(5000))
    prompts_of(split, 3, 3, 8)
    assert split.source.read < 300  # the split looks at 65 groups, too


def test_too_few_prompts_and_lone_surrogates_are_refused() -> None:
    few, broken = split_of(corpus(6)), split_of(["\ud800" + d for d in corpus(6)])
    for split, arguments, message in (
        (few, (1, 500, 8), r"validation documents of listed hold only \d+ different"),
        (few, (1, 1, 31), "training documents of listed hold only 0 different"),
        (broken, (1, 1, 4), "half a character"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts_of(split, *arguments)

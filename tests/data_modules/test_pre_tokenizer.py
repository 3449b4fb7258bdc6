"""The words of a text by Python and by C++: the same ones, with the same numbers."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.tokenizers import pre_tokenizer
from data_modules.tokenizers.bpe import BPETokenizer
from data_modules.tokenizers.pre_tokenizer import (
    NativePreTokenizer,
    PreTokenizer,
    PythonPreTokenizer,
)

# Every kind of character, alone and in runs around the longest that is one word.
RUNS = st.builds(
    lambda character, length: character * length,
    st.sampled_from([*" \n\t\r\v\fa_Z09!.\x00\x1f\x7f", "\x80", "é", "語", "😀", "\u2028"]),
    st.sampled_from([1, 1, 1, 2, 3, 63, 64, 65, 66, 128, 129]),
)
TEXTS = st.lists(st.one_of(RUNS, st.text(max_size=8)), max_size=12).map("".join)
# As it is given to the library, whose notation of characters Python does not know.
WRITTEN = pre_tokenizer.PATTERN.replace(r"\x{80}", "\x80").replace(r"\x{10FFFF}", "\U0010ffff")

native = pytest.mark.skipif(pre_tokenizer.library is None, reason="its C++ was not built")
BOTH = [
    PythonPreTokenizer,
    pytest.param(lambda: NativePreTokenizer(pre_tokenizer.library), marks=native),
]


@pytest.mark.parametrize("make", BOTH)
@settings(deadline=None, max_examples=40)
@given(texts=st.lists(TEXTS, max_size=3))
def test_words_are_the_patterns_and_numbered_by_first_use(make, texts: list[str]) -> None:
    table: PreTokenizer = make()
    known: list[str] = []
    for text in texts:
        wanted = re.findall(WRITTEN, text)
        assert "".join(wanted) == text
        first = [word for word in dict.fromkeys(wanted) if word not in known]
        known += first
        numbers, new = table.split(text)
        assert new == first and len(table) == len(known)
        assert [known[number] for number in numbers] == wanted


@native
def test_a_large_table(seeded_words: list[str]) -> None:
    table = NativePreTokenizer(pre_tokenizer.library)  # type: ignore[arg-type]
    text = "".join(seeded_words)
    numbers, new = table.split(text)
    assert len(table) == len(new) == len(set(seeded_words)) > 5000
    assert [new[number] for number in numbers] == seeded_words
    again, none = table.split(text)
    assert none == [] and again.tolist() == numbers.tolist()


@pytest.fixture
def seeded_words() -> list[str]:
    return [f" w{'xyz'[n % 3] * (n % 61)}" if n % 2 else f" {n % 9001}" for n in range(30_000)]


def test_ids_are_the_same_by_either(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def naïve(x):\n    return  x * 2  # größer\n\n" * 3 + "語" * 70 + " " * 130
    tokenizer = BPETokenizer(300).train([text])
    found = tokenizer.encode(text)
    monkeypatch.setattr(pre_tokenizer, "library", None)
    assert BPETokenizer.from_state(tokenizer.state()).encode(text).tolist() == found.tolist()
    assert tokenizer.decode(found) == text


def test_threads_share_a_tokenizer(seeded_words: list[str]) -> None:
    tokenizer = BPETokenizer(300).train(seeded_words[:500])
    texts = ["".join(seeded_words[start : start + 3000]) for start in range(0, 27_000, 1500)]
    expected = [BPETokenizer.from_state(tokenizer.state()).encode(text).tolist() for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: tokenizer.encode(text).tolist(), texts))
    assert found == expected


def test_a_failure_leaves_no_word_without_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BPETokenizer(300).train(["some words of a text"])
    expected = tokenizer.encode("other words").tolist()
    tokenizer = BPETokenizer.from_state(tokenizer.state())

    class Failing:
        def encode_batch_fast(self, *given: object, **more: object) -> None:
            raise KeyboardInterrupt

    library = tokenizer._library
    monkeypatch.setattr(tokenizer, "_library", Failing())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("other words")
    monkeypatch.setattr(tokenizer, "_library", library)
    assert tokenizer.encode("other words").tolist() == expected

"""The Python and the C++ pre-tokenizer split a text into the same numbered words."""

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
# In the notation of Python instead of that of the tokenizers library.
PATTERN = pre_tokenizer.PATTERN.replace(r"\x{80}", "\x80").replace(r"\x{10FFFF}", "\U0010ffff")

native = pytest.mark.skipif(pre_tokenizer.library is None, reason="its C++ was not built")
BOTH = [
    PythonPreTokenizer,
    pytest.param(lambda: NativePreTokenizer(pre_tokenizer.library), marks=native),
]


@pytest.mark.parametrize("make", BOTH)
@settings(deadline=None, max_examples=40)
@given(texts=st.lists(TEXTS, max_size=3))
def test_words_match_the_pattern_and_are_numbered_by_first_use(make, texts: list[str]) -> None:
    table: PreTokenizer = make()
    words: list[str] = []
    for text in texts:
        expected = re.findall(PATTERN, text)
        assert "".join(expected) == text
        added = [word for word in dict.fromkeys(expected) if word not in words]
        words += added
        numbers, new = table.split(text)
        assert new == added and len(table) == len(words)
        assert [words[number] for number in numbers] == expected


@native
def test_a_table_of_thousands_of_words(seeded_words: list[str]) -> None:
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


def test_ids_do_not_depend_on_the_pre_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def naïve(x):\n    return  x * 2  # größer\n\n" * 3 + "語" * 70 + " " * 130
    tokenizer = BPETokenizer(300).train([text])
    ids = tokenizer.encode(text)
    monkeypatch.setattr(pre_tokenizer, "library", None)
    assert BPETokenizer.from_state(tokenizer.state()).encode(text).tolist() == ids.tolist()
    assert tokenizer.decode(ids) == text


def test_threads_share_a_tokenizer(seeded_words: list[str]) -> None:
    tokenizer = BPETokenizer(300).train(seeded_words[:500])
    texts = ["".join(seeded_words[start : start + 3000]) for start in range(0, 27_000, 1500)]
    expected = [BPETokenizer.from_state(tokenizer.state()).encode(text).tolist() for text in texts]
    with ThreadPoolExecutor(8) as pool:
        encoded = list(pool.map(lambda text: tokenizer.encode(text).tolist(), texts))
    assert encoded == expected


def test_an_interrupted_encoding_leaves_no_word_without_ids(monkeypatch) -> None:
    tokenizer = BPETokenizer(300).train(["some words of a text"])
    expected = tokenizer.encode("other words").tolist()
    tokenizer = BPETokenizer.from_state(tokenizer.state())

    class Failing:
        def encode_batch_fast(self, *_: object, **__: object) -> None:
            raise KeyboardInterrupt

    library = tokenizer._library
    monkeypatch.setattr(tokenizer, "_library", Failing())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("other words")
    monkeypatch.setattr(tokenizer, "_library", library)
    assert tokenizer.encode("other words").tolist() == expected

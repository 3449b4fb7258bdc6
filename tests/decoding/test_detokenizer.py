"""Text in pieces against the text of all tokens at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies

from data_modules.tokenizers import BPETokenizer, ByteTokenizer, SymbolTokenizer
from mtp_lightning.decoding.detokenizer import Detokenizer

LETTERS = "a \u00e9\u4f60\U0001f600\ufffd"
TOKENIZERS = {
    "byte": ByteTokenizer(),
    "bpe": BPETokenizer(vocab_size=300).train(
        ["\u00e9t\u00e9 \u4f60\u597d, a text \U0001f600 "] * 9
    ),
    "symbols": SymbolTokenizer(["end", *"abcdefg"]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=30)
@given(data=strategies.data())
def test_joined_they_are_the_text(name: str, data: strategies.DataObject) -> None:
    """Any ids are joined, of which few are characters; an incomplete end is left out."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(strategies.lists(strategies.integers(0, tokenizer.vocab_size - 1)))
    if data.draw(strategies.booleans()) and tokenizer.reads_text:
        ids += tokenizer.encode(data.draw(strategies.text(LETTERS))).tolist()
    detokenizer, text = Detokenizer(tokenizer), ""
    for token in ids:
        text += "".join(piece for piece, _ in detokenizer.add([token], [False]))
    whole = tokenizer.decode([i for i in ids if i != tokenizer.eot_id])
    assert whole.startswith(text) and not whole[len(text) :].strip("\ufffd")


def test_a_character_comes_with_the_last_of_its_tokens() -> None:
    tokenizer = ByteTokenizer()
    detokenizer = Detokenizer(tokenizer)
    told = [[piece for piece, _ in detokenizer.add([byte], [True])] for byte in "a\u4f60b".encode()]
    assert told == [["a"], [], [], ["\u4f60"], ["b"]]


def test_drafts_are_told_apart() -> None:
    detokenizer = Detokenizer(ByteTokenizer())
    assert list(detokenizer.add(list(b"ab"), [True, False])) == [("a", True), ("b", False)]

"""The bytes that a token stands for."""

from __future__ import annotations

import pytest

from data_modules.tokenizers.bpe import BPETokenizer
from data_modules.tokenizers.byte import ByteTokenizer

TEXT = "naïve  text, \tsome of it – 漢字 🙂 – again and again and again.\n"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_bytes_of_tokens_make_the_text(kind: str) -> None:
    tokenizer = ByteTokenizer() if kind == "byte" else BPETokenizer(300).train([TEXT] * 3)
    table = tokenizer.token_bytes()
    assert len(table) == tokenizer.vocab_size
    assert b"".join(table[i] for i in tokenizer.encode(TEXT)) == TEXT.encode()
    assert table[tokenizer.eot_id] == b"<|endoftext|>"

"""Ids without text: only the size of the vocabulary and the end-of-text token are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_modules.tokenizers.base import Tokenizer
from data_modules.tokenizers.library import word_level_json
from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_whole
from mtp_lightning.stored import LARGEST_VOCAB


class IdTokenizer(Tokenizer):
    """Reads and writes ids as numbers separated by spaces; their text is unknown.

    Raises:
        UserError: a number out of range; in ``encode`` also a word that is not an id.
    """

    kind = "ids"
    vocab_size = eot_id = 0  # replaces abstract properties; each tokenizer sets its own
    reads_text = False

    def __init__(self, vocab_size: int, eot_id: int) -> None:
        require_whole("tokenizer.vocab_size", vocab_size, least=2, most=LARGEST_VOCAB)
        require_whole("tokenizer.eot_id", eot_id, least=0, most=vocab_size - 1)
        self.vocab_size = vocab_size
        self.eot_id = eot_id
        self.eot_token = str(eot_id)

    def encode(self, text: str) -> np.ndarray:
        words = text.split()
        for word in words:
            # Python refuses to read a number of thousands of digits.
            number = int(word) if word.isascii() and word.isdigit() and len(word) < 20 else -1
            if not 0 <= number < self.vocab_size:
                raise UserError(
                    f"{word[:40]!r} is not an id: tokenizer=ids knows no text, so write ids from 0 "
                    f"to {self.vocab_size - 1} with spaces between them, or set "
                    "tokenizer=pretrained"
                )
        return np.array([int(word) for word in words], np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(f" {i}" for i in np.asarray(ids, np.int64).reshape(-1).tolist())

    def token_bytes(self) -> list[bytes]:
        return [b""] * self.vocab_size

    def library_json(self) -> str:
        return word_level_json({str(i): i for i in range(self.vocab_size)}, str(self.eot_id))

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab_size": self.vocab_size, "eot_id": self.eot_id}

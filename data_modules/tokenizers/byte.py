"""One token per UTF-8 byte, and an end-of-text token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_modules.tokenizers.base import END_OF_TEXT, Tokenizer
from data_modules.tokenizers.library import printable


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are bytes, and 256 is end of text. Lossless, and needs only numpy."""

    kind = "byte"
    vocab_size = 257
    eot_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # The store needs no wider type for bytes.
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        array = array[array <= self.eot_id]  # a larger model may give others, which have no text
        ends = np.flatnonzero(array == self.eot_id)
        pieces = np.split(array, ends)
        parts = [pieces[0], *(piece[1:] for piece in pieces[1:])]
        return END_OF_TEXT.join(
            part.astype(np.uint8).tobytes().decode("utf-8", "replace") for part in parts
        )

    def token_bytes(self) -> list[bytes]:
        return [*(bytes([byte]) for byte in range(256)), END_OF_TEXT.encode()]

    def library_json(self) -> str:
        """A byte-level BPE without merges, so that the library gives every byte its own id."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocab = {printable(byte): byte for byte in range(256)}
        library = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return str(library.to_str())

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind}

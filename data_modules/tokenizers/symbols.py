"""A task's own symbols, separated by spaces: nothing to train, and no other text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_modules.tokenizers.base import Tokenizer
from data_modules.tokenizers.library import word_level_json
from mtp_lightning.errors import UserError


class SymbolTokenizer(Tokenizer):
    """One id per symbol; the first symbol is the end of a text. Symbols are distinct and without
    white space. ``encode`` reads symbols separated by white space, and raises a UserError for
    anything else; ``decode`` writes a space before each symbol, so that texts can be
    concatenated; an id beyond the symbols, which a larger model may give, has no text."""

    kind = "symbols"
    eot_id = 0
    vocab_size = 0  # replaces the abstract property; each tokenizer sets its own
    reads_text = False

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = tuple(symbols)
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.eot_token = self.symbols[0]
        self.vocab_size = len(self.symbols)
        if len(self._ids) < len(self.symbols) or not all(isinstance(s, str) for s in self.symbols):
            raise UserError("a task's symbols must be different strings")

    def encode(self, text: str) -> np.ndarray:
        symbols = text.split()
        for symbol in symbols:
            if symbol not in self._ids:
                examples = " ".join(self.symbols[1:9])
                raise UserError(
                    f"{symbol!r} is not a symbol of the task that this model was trained on: write "
                    f"symbols with spaces between them ({examples} ..)."
                )
        return np.array([self._ids[symbol] for symbol in symbols], np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = (i for i in np.asarray(ids, np.int64).reshape(-1) if i < len(self.symbols))
        return "".join(f" {self.symbols[i]}" for i in known)

    def token_bytes(self) -> list[bytes]:
        return [f" {symbol}".encode() for symbol in self.symbols]

    def library_json(self) -> str:
        return word_level_json(self._ids, self.symbols[0])

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "symbols": list(self.symbols)}

"""Turn tokens into text as soon as they make up whole characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Mark = TypeVar("Mark")


class Detokenizer:
    """Takes the tokens of one text as they come.

    A character of several tokens is returned with the last of them. The pieces joined are the text
    of all tokens, except for an incomplete character at the end.

    Args:
        tokenizer: the model's, with ``decode(ids)`` and ``eot_id``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode: Callable[[list[int]], str] = tokenizer.decode
        self._eot_id = tokenizer.eot_id
        # The last token of the previous piece, without which some tokenizers would drop a space,
        # and the tokens whose text is still incomplete. `_out` of their characters were returned.
        self._window: list[int] = []
        self._out = 0

    def add(self, token_ids: Sequence[int], marks: Sequence[Mark]) -> Iterator[tuple[str, Mark]]:
        """The text that is complete now, in pieces, each with the mark of its last token."""
        for token, mark in zip(token_ids, marks, strict=True):
            if token == self._eot_id:
                continue
            self._window.append(token)
            text = self._decode(self._window)
            whole = len(text.rstrip("\ufffd"))  # the rest may be part of a character
            if whole > self._out:
                yield text[self._out : whole], mark
                self._out = whole
            if whole == len(text):
                self._window = [token]
                self._out = len(self._decode(self._window))

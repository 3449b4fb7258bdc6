"""Tokens as text, as soon as they make up characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Pieces:
    """Takes the tokens of one text as they come.

    A character that several tokens make up comes with the last of them.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode: Callable[[list[int]], str] = tokenizer.decode
        self._eot_id = tokenizer.eot_id
        self._pending: list[int] = []

    def add(self, token_ids: Sequence[int], accepted: Sequence[bool]) -> Iterator[tuple[str, bool]]:
        """The text that is whole now, in pieces, and whether each was an accepted draft."""
        for token, draft in zip(token_ids, accepted, strict=True):
            if token == self._eot_id:
                continue
            self._pending.append(token)
            text = self._decode(self._pending)
            # An incomplete character; four bytes are the longest, so the wait has an end.
            if text.endswith("\ufffd") and len(self._pending) < 4:
                continue
            self._pending.clear()
            yield text, draft

"""Turn tokens into text as soon as they make up whole characters.

A tokenizer may decode a token differently after others: Llama's drops the space before a text's
first word, and makes a character of bytes only if all of them are there. So new tokens are decoded
together with those of the last whole piece of text.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mtp_lightning.decoding.options import Prompt

# The most tokens at a prompt's end that are searched for its last whole piece of text.
_LONGEST_PIECE = 8
# Bytes that are not a character, or not yet, are decoded to this.
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Takes the tokens of one text as they come.

    A character of several tokens is returned with the last of them. The results joined are the text
    of all tokens, except for an incomplete character at the end. ``ends`` are the tokens that end a
    text and have no text.
    """

    def __init__(self, tokenizer: Any, before: Prompt, ends: Collection[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        # `_window`: the tokens of the last whole piece, `_n_whole` of them, and those whose text is
        # incomplete. `_n_out` of their characters were returned.
        self._begin(last_piece(tokenizer, before, ends))

    def _begin(self, piece: list[int]) -> None:
        self._window, self._n_whole = piece, len(piece)
        self._n_out = len(self._tokenizer.decode(piece))

    @property
    def waits(self) -> bool:
        """Whether the last tokens are part of a character that is not complete."""
        return len(self._window) > self._n_whole

    def rest(self) -> str:
        """What stands for the bytes at the end that are not a character."""
        tail = str(self._tokenizer.decode(self._window[self._n_whole :]))
        return tail[len(tail.rstrip(_INCOMPLETE)) :]

    def add(self, token: int) -> str:
        """The characters that a token completes."""
        if token in self._ends:
            return ""
        decode, waiting = self._tokenizer.decode, self._window[self._n_whole :]
        if len(waiting) > _LONGEST_PIECE:  # a character has 4 bytes at most
            bad = self.rest()
            if decode([*waiting, token]) == decode(waiting) + decode([token]):
                self._begin([])
                return bad + self.add(token)
        self._window.append(token)
        text = decode(self._window)
        end = len(text.rstrip(_INCOMPLETE))  # the rest may be part of a character
        new = text[self._n_out : end]
        if not text:
            self._begin(self._window)  # the decoder may drop a space of the first token alone
            return ""
        if not new and end == len(text):
            self._window.pop()  # a token without text
            return ""
        self._n_out = max(self._n_out, end)
        if end == len(text):
            self._begin(self._window[self._n_whole :])
        return str(new)


def last_piece(tokenizer: Any, ids: Prompt, ends: Collection[int]) -> list[int]:
    """The last tokens that make up whole characters, as few as possible; none if the text ends in
    the middle of one, or with the end of text."""
    for n in range(1, min(len(ids), _LONGEST_PIECE) + 1):
        piece = [int(token) for token in ids[len(ids) - n :]]
        if piece[0] in ends:
            break
        text = tokenizer.decode(piece)
        if text and _INCOMPLETE not in text:
            return piece
    return []

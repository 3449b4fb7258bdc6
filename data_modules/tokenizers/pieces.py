"""How the tokenizers library writes the bytes of a token as characters, and back."""

from __future__ import annotations

import json
import re


def printable(byte: int) -> str:
    """GPT-2's character for a byte: itself if it is visible, else one from 256 on, in order."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in seen:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in seen].index(byte))


def bytes_of_pieces(library_json: str, vocab_size: int) -> list[bytes]:
    """The bytes of every id of a tokenizer of the library.

    Args:
        library_json: its ``tokenizer.json``.
        vocab_size: length of the list; unused ids are empty.
    """
    from data_modules.tokenizers.library import library_tokenizer

    library = library_tokenizer(library_json, source="the tokenizer")
    added = {i: token.content for i, token in library.get_added_tokens_decoder().items()}
    byte_level = "ByteLevel" in json.dumps(json.loads(library_json).get("decoder"))
    byte_of = {printable(byte): byte for byte in range(256)}
    found = [b""] * vocab_size
    for piece, i in library.get_vocab(with_added_tokens=True).items():
        if i in added:
            found[i] = added[i].encode()
        elif byte_level and all(letter in byte_of for letter in piece):
            found[i] = bytes(byte_of[letter] for letter in piece)
        elif single := re.fullmatch("<0x([0-9A-F]{2})>", piece):  # SentencePiece's byte fallback
            found[i] = bytes([int(single[1], 16)])
        else:
            found[i] = piece.replace("\u2581", " ").encode()
    return found

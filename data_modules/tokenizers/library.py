"""Tokenizers of the tokenizers library, from files that anybody may have written.

The library is Rust: some invalid files make it panic, which no ``except Exception`` catches, or
abort the process. So the content of a file is checked before the library reads it.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mtp_lightning.errors import UserError
from mtp_lightning.stored import LARGEST_VOCAB

# How many times longer a text may become before it is split, or a token when it is decoded: the
# largest of Unicode's own compositions is 18.
LARGEST_GROWTH = 256
# Tokenizers with their JSON, so that a copy is not built again.
_WRITTEN: deque[tuple[str, Any]] = deque(maxlen=2)


def library_tokenizer(text: str, *, source: object) -> Any:
    """A tokenizer of the library, without padding and truncation, from the text of a
    ``tokenizer.json``; ``source`` says where it comes from.

    Raises:
        UserError: if it is not a tokenizer, or would use all memory.
    """
    from tokenizers import Tokenizer

    quiet_forks()
    for cached_text, cached in _WRITTEN:
        if text == cached_text:
            return cached
    try:
        _check(json.loads(text))
        library = Tokenizer.from_str(text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the library is not an Exception
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{source} is not a tokenizer.json that can be read: {reason}.") from None
    library.no_padding()
    library.no_truncation()
    return library


def written(library: Any) -> str:
    """The content of a ``tokenizer.json`` for a tokenizer of :func:`library_tokenizer`."""
    text = str(library.to_str())
    _WRITTEN.append((text, library))
    return text


def quiet_forks() -> None:
    """Keeps the library from printing a warning in every loader worker that is forked later.
    Workers load windows and never encode, so its threads and the forks do not meet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def decode(library: Any, ids: Sequence[int] | np.ndarray) -> str:
    """Text of ids by a tokenizer of the library, with the names of special tokens."""
    numbers = np.asarray(ids, np.int64).reshape(-1).tolist()
    return str(library.decode(numbers, skip_special_tokens=False))


def word_level_json(ids: dict[str, int], eot_token: str) -> str:
    """The ``tokenizer.json`` of words that are separated by white space."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel(ids, unk_token=eot_token))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([AddedToken(eot_token, special=True, normalized=False)])
    return str(library.to_str())


def _check(content: Any) -> None:
    """Refuses ids and counts too large for a vocabulary, since the library allocates a table as
    large, and steps that make a text too long."""
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    todo: list[Any] = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list):
            todo += value.values() if isinstance(value, dict) else value
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"it holds the number {value}")
        if isinstance(value, int) and not -1 <= value < 1 << 32:
            raise ValueError(f"it holds a whole number of {value.bit_length()} bits")
    for number in _ids(content):
        if not 0 <= number < LARGEST_VOCAB:
            raise ValueError(f"it has the id {number:,}, and at most {LARGEST_VOCAB:,} are read")
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = math.prod(map(_growth, _steps(content.get(part))))
        if growth > LARGEST_GROWTH:
            raise ValueError(f"its {part} makes a text {growth:,} times as long")


def _ids(content: dict[str, Any]) -> Iterator[int]:
    vocabulary = content["model"].get("vocab")
    yield from vocabulary.values() if isinstance(vocabulary, dict) else ()
    yield from (token["id"] for token in content.get("added_tokens") or ())


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, with those of a sequence in order."""
    if isinstance(part, dict):
        yield part
        for name in ("normalizers", "pretokenizers", "decoders"):
            for step in part.get(name) or ():
                yield from _steps(step)


def _growth(step: dict[str, Any]) -> int:
    """The most characters that a step makes of one character."""
    if step.get("type") == "Replace":
        pattern, content = step["pattern"], len(step["content"])
        if "String" in pattern:
            return max(1, -(-content // max(1, len(pattern["String"]))))
        return 1 + content  # a regular expression may match before every character
    if step.get("type") == "Precompiled" and step.get("precompiled_charsmap"):
        charsmap = base64.b64decode(step["precompiled_charsmap"])
        (trie,) = struct.unpack_from("<I", charsmap)
        return max(1, *map(len, charsmap[4 + trie :].split(b"\0")))
    return 1


def printable(byte: int) -> str:
    """GPT-2's character for a byte: itself if it is visible, else one from 256 on, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in visible:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in visible].index(byte))


def bytes_of_pieces(library_json: str, vocab_size: int) -> list[bytes]:
    """The bytes of ids 0 .. ``vocab_size`` - 1 of a tokenizer of the library, by its
    ``tokenizer.json``; unused ids are empty."""
    library = library_tokenizer(library_json, source="the tokenizer")
    added = {i: token.content for i, token in library.get_added_tokens_decoder().items()}
    content = json.loads(library_json)
    # Without a decoder, tokens are joined by spaces, as WordPiece's joins words.
    decoder = content.get("decoder") or {"type": "WordPiece"}
    byte_level = "ByteLevel" in json.dumps(decoder)
    # The decoder of CLIP's tokenizers does not name the end of a word.
    space = decoder.get("suffix") or content["model"].get("end_of_word_suffix") or "\u2581"
    byte_of = {printable(byte): byte for byte in range(256)} | {" ": 0x20}
    token_bytes = [b""] * vocab_size
    for piece, i in library.get_vocab(with_added_tokens=True).items():
        text = piece.replace(space, " ")
        if i in added:
            token_bytes[i] = added[i].encode()
        elif byte_level and all(letter in byte_of for letter in text):
            token_bytes[i] = bytes(byte_of[letter] for letter in text)
        elif single := re.fullmatch("<0x([0-9A-F]{2})>", piece):  # SentencePiece's byte fallback
            token_bytes[i] = bytes([int(single[1], 16)])
        elif decoder["type"] == "WordPiece":  # the text after another token: " word" or "piece"
            token_bytes[i] = library.decode([i, i])[len(library.decode([i])) :].encode()
        else:
            token_bytes[i] = text.encode()
    return token_bytes

"""The tokenizers library's own tokenizers from files that may be anybody's.

The library is Rust: some files that no training wrote make it panic, which no ``except Exception``
catches, or abort the process. What they hold is looked at before the library sees it.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.stored import LARGEST_VOCAB

# How many times as long a text may become before it is split, or a token when it is shown: the
# largest of Unicode's own compositions is 18.
LARGEST_GROWTH = 256


def library_tokenizer(text: str, *, source: object) -> Any:
    """A tokenizer of the library, without padding and truncation.

    Args:
        text: a ``tokenizer.json``.
        source: of it, for messages.

    Raises:
        UserError: it is none, or would take all memory.
    """
    from tokenizers import Tokenizer

    try:
        content = json.loads(text)
        _require_numbers(content)
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            growth = math.prod(map(_growth, _steps(content.get(part))))
            if growth > LARGEST_GROWTH:
                raise ValueError(f"its {part} makes a text {growth:,} times as long")
        library = Tokenizer.from_str(text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library's panics are no Exception
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{source} is not a tokenizer.json that can be read: {told}.") from None
    library.no_padding()
    library.no_truncation()
    return library


def _require_numbers(content: Any) -> None:
    """Refuse ids and counts that no vocabulary has: the library makes a table of their size."""
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    todo: list[Any] = [content]
    while todo:
        found = todo.pop()
        if isinstance(found, dict | list):
            todo += found.values() if isinstance(found, dict) else found
        if isinstance(found, float) and not math.isfinite(found):
            raise ValueError(f"it holds the number {found}")
        if isinstance(found, int) and not -1 <= found < 1 << 32:
            raise ValueError(f"it holds a whole number of {found.bit_length()} bits")
    for number in _ids(content):
        if not 0 <= number < LARGEST_VOCAB:
            raise ValueError(f"it has the id {number:,}, and at most {LARGEST_VOCAB:,} are read")


def _ids(content: dict[str, Any]) -> Iterator[int]:
    vocabulary = content["model"].get("vocab")
    yield from vocabulary.values() if isinstance(vocabulary, dict) else ()
    yield from (token["id"] for token in content.get("added_tokens") or ())


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """A normalizer or decoder, or those that one is a sequence of."""
    if isinstance(part, dict):
        yield part
        for name in ("normalizers", "pretokenizers", "decoders"):
            for step in part.get(name) or ():
                yield from _steps(step)


def _growth(step: dict[str, Any]) -> int:
    """At most how many characters a step makes of one."""
    if step.get("type") == "Replace":
        pattern, content = step["pattern"], len(step["content"])
        if "String" in pattern:
            return max(1, -(-content // max(1, len(pattern["String"]))))
        return 1 + content  # an expression may match before every character
    if step.get("type") == "Precompiled" and step.get("precompiled_charsmap"):
        charsmap = base64.b64decode(step["precompiled_charsmap"])
        (trie,) = struct.unpack_from("<I", charsmap)
        return max(1, *map(len, charsmap[4 + trie :].split(b"\0")))
    return 1

"""A tokenizer of SentencePiece's BPE in a GGUF file, as Llama 2 and Mistral have it.

The file holds pieces with scores and no merges. SentencePiece joins the two neighbors whose joint
piece has the highest score, until none has one; that is BPE with its merges in the order of these
scores.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6
_SPACE = "\u2581"
_LONGEST = 256  # characters of a piece; SentencePiece makes none longer than 16 by default


def to_fields(
    model: dict[str, Any], tokens: list[str], types: list[int], *, spaced: bool
) -> dict[str, Any]:
    """The keys of this kind of tokenizer; ``types`` are changed in place.

    Args:
        model: the BPE with its merges, from a tokenizer.json.
        tokens: its pieces by id.
        types: their types by id, the unknown token and bytes not told apart yet.
        spaced: whether a space is put before every text.
    """
    for i, token in enumerate(tokens):
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = _BYTE
    rank: dict[str, int] = {}
    for merge in model["merges"]:
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), len(rank))
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": [-float(rank.get(token, len(rank))) for token in tokens],
        "tokenizer.ggml.add_space_prefix": spaced,
    }
    if model.get("unk_token") in tokens:
        unknown = tokens.index(model["unk_token"])
        types[unknown] = _UNKNOWN
        fields["tokenizer.ggml.unknown_token_id"] = unknown
    return fields


def bpe_parts(
    get: Callable[[str], Any], tokens: list[str], types: list[int]
) -> dict[str, Any] | None:
    """The normalizer, decoder and model of a tokenizer.json, from the pieces and their types by id;
    None without a score of every piece."""
    scores = get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        return None
    if not all(isinstance(score, float) for score in scores):
        return None
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = get("tokenizer.ggml.unknown_token_id")
    known = isinstance(unknown, int) and unknown in range(len(tokens))
    spaced = get("tokenizer.ggml.add_space_prefix") is not False
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    words = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    first = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": _SPACE}] if spaced else []), spaces],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                words,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([first] if spaced else []),
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": _merges(vocab, scores, types),
            "unk_token": tokens[unknown] if known else None,
            "fuse_unk": True,
            "byte_fallback": _BYTE in types,
        },
    }


def _merges(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[list[str]]:
    """All pairs of pieces that make up a piece, the piece with the highest score first."""
    ranked = []
    for piece, i in vocab.items():
        if types[i] == _NORMAL and len(piece) <= _LONGEST:
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in vocab and right in vocab:
                    ranked.append((-scores[i], vocab[left], vocab[right], [left, right]))
    return [pair for *_, pair in sorted(ranked)]

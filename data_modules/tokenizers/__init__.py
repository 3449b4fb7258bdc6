"""Tokenizers, one file each, with the interface of ``base.py``."""

from __future__ import annotations

from data_modules.tokenizers.base import END_OF_TEXT, Tokenizer, tokenizer_from_state
from data_modules.tokenizers.bpe import BPETokenizer
from data_modules.tokenizers.byte import ByteTokenizer
from data_modules.tokenizers.ids import IdTokenizer
from data_modules.tokenizers.pretrained import PretrainedTokenizer
from data_modules.tokenizers.symbols import SymbolTokenizer

KINDS: dict[str, type[Tokenizer]] = {
    kind.kind: kind
    for kind in (ByteTokenizer, BPETokenizer, PretrainedTokenizer, SymbolTokenizer, IdTokenizer)
}

__all__ = [
    "END_OF_TEXT",
    "KINDS",
    "BPETokenizer",
    "ByteTokenizer",
    "IdTokenizer",
    "PretrainedTokenizer",
    "SymbolTokenizer",
    "Tokenizer",
    "tokenizer_from_state",
]

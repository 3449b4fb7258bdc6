"""Tokenizers, one file each, with the interface of ``base.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtp_lightning.parts import on_demand

if TYPE_CHECKING:
    from data_modules.tokenizers.base import END_OF_TEXT, Tokenizer, tokenizer_from_state
    from data_modules.tokenizers.bpe import BPETokenizer
    from data_modules.tokenizers.byte import ByteTokenizer
    from data_modules.tokenizers.ids import IdTokenizer
    from data_modules.tokenizers.pretrained import PretrainedTokenizer
    from data_modules.tokenizers.symbols import SymbolTokenizer

__all__ = [
    "END_OF_TEXT", "BPETokenizer", "ByteTokenizer", "IdTokenizer", "PretrainedTokenizer",
    "SymbolTokenizer", "Tokenizer", "tokenizer_from_state",
]  # fmt: skip

__getattr__ = on_demand(__name__)

"""How much text a model sees at once: tokens of two tokenizers are not the same amount of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sweeps.report.comparable import by_text
from sweeps.report.metrics import some
from sweeps.report.settings import Setting

EQUAL = 1.05  # largest context over the smallest


def contexts(settings: Sequence[Setting]) -> list[str]:
    """A sentence for all settings of one text whose windows differ in tokens or in tokenizer:
    whether they see equally many bytes."""
    sentences = (_sentence(group) for group in by_text(settings))
    return [sentence for sentence in sentences if sentence]


def _sentence(group: Sequence[Setting]) -> str:
    if len({(_seq_len(s), _tokenizer(s)) for s in group}) < 2:
        return ""
    by_size: dict[str, list[str]] = {}
    for setting in group:
        by_size.setdefault(_shown(setting), []).append(setting.label)
    sizes = [size for setting in group if (size := _size(setting))]
    if len(sizes) < len(group):
        said = "Whether the context is equal in bytes is unknown"
    elif max(sizes) <= EQUAL * min(sizes):
        said = "The context is equalised in bytes, within 5 %"
    else:
        said = "The context is not equalised: a model that sees more text may predict better"
    windows = [f"{size} with {some(labels)}" for size, labels in by_size.items()]
    return f"{said}. A window has {some(windows, between=' | ')}."


def _size(setting: Setting) -> float | None:
    """Bytes in a window of inputs."""
    tokens, rate = _seq_len(setting), _bytes_per_token(setting)
    return None if tokens is None or rate is None else tokens * rate


def _shown(setting: Setting) -> str:
    tokens, rate, size = _seq_len(setting), _bytes_per_token(setting), _size(setting)
    window = "unknown tokens" if tokens is None else f"{tokens:,} tokens"
    each = "unknown bytes" if rate is None else f"{rate:.2f} bytes"
    return f"{window} x {each}" + ("" if size is None else f" = {size:,.0f} bytes")


def _seq_len(setting: Setting) -> int | None:
    tokens = setting.config.get("data.seq_len")
    return tokens if isinstance(tokens, int) else None


def _bytes_per_token(setting: Setting) -> float | None:
    """Of the evaluated targets; of the whole validation split where these are not counted."""
    text = setting.text
    if text and text.bytes and text.tokens:
        return text.bytes / text.tokens
    rate: Any = setting.done[0].fact("data", "val", "bytes_per_token")
    return float(rate) if isinstance(rate, int | float) else None


def _tokenizer(setting: Setting) -> str:
    return json.dumps(setting.done[0].fact("data", "tokenizer", "fingerprint"))

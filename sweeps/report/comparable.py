"""Decides which settings may be compared, and explains which may not.

Settings compare if they were evaluated on the same text (:func:`may_compare`). Windows of unequal
bytes, and depths that solve different tasks, add sentences to the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from sweeps import grouped
from sweeps.report.metrics import BITS, BITS_ERROR, BY_TAG, first_few, first_to_last
from sweeps.report.names import sentence
from sweeps.report.settings import Setting, Settings

EQUAL_CONTEXT = 1.05  # largest context over the smallest, in bytes


def may_compare(setting: Setting, other: Setting) -> bool:
    """Whether two settings were evaluated on the same data. Decoding depends on it, too: its
    prompts are held-out documents. Training loss, throughput, FLOPs and seconds do not."""
    return bool(_text(setting) == _text(other))


def by_text(settings: Iterable[Setting]) -> list[list[Setting]]:
    """Settings with finished runs, grouped by those that may be compared."""
    return [*grouped((_text(setting), setting) for setting in settings if setting.done).values()]


def _text(setting: Setting) -> Any:
    """A key that is equal for settings of one text; one without a digest has a key of its own."""
    return (setting.text and setting.text.fingerprint) or setting


def refusal(settings: Sequence[Setting]) -> str:
    """The sentences that refuse a comparison and say what would help; empty for one text."""
    groups = by_text(settings)
    if len(groups) < 2:
        return ""
    by_name = grouped((_name(setting), setting) for group in groups for setting in group)
    parts = [
        f"{name}{_bytes(group)}: {first_few([setting.name for setting in group])}"
        for name, group in by_name.items()
    ]
    return sentence("refusal", texts=first_few(parts, between=" | "), remedy=sentence("remedy"))


def _name(setting: Setting) -> str:
    if setting.text is None or setting.text.fingerprint is None:
        return sentence("unknown_data")
    return f"data {setting.text.short}"


def _bytes(group: Sequence[Setting]) -> str:
    counts = sorted({s.text.bytes for s in group if s.text and s.text.bytes is not None})
    return f" ({first_to_last([f'{count:,}' for count in counts])} bytes)" if counts else ""


def contexts(settings: Sequence[Setting]) -> list[str]:
    """Whether windows have equally many bytes, for each text of unlike windows or tokenizers."""
    return [sentence for group in by_text(settings) if (sentence := _context(group))]


def _context(group: Sequence[Setting]) -> str:
    lengths = (s.config.get("data.seq_len") for s in group)
    token_counts = [length if isinstance(length, int) else None for length in lengths]
    windows = list(zip(token_counts, map(_bytes_per_token, group), strict=True))
    tokenizers = [json.dumps(s.done[0].fact("data", "tokenizer", "fingerprint")) for s in group]
    if len({(tokens, name) for (tokens, _), name in zip(windows, tokenizers, strict=True)}) < 2:
        return ""
    sizes = [t * rate for t, rate in windows if t is not None and rate is not None]
    if len(sizes) < len(group):
        key = "context_unknown"
    else:
        key = "context_equal" if max(sizes) <= EQUAL_CONTEXT * min(sizes) else "context_differs"
    by_size = grouped((_window(*w), s.name) for s, w in zip(group, windows, strict=True))
    parts = [f"{size} with {first_few(labels)}" for size, labels in by_size.items()]
    return sentence(key, windows=first_few(parts, between=" | "))


def _window(tokens: int | None, rate: float | None) -> str:
    tokens_text = "unknown tokens" if tokens is None else f"{tokens:,} tokens"
    rate_text = "unknown bytes" if rate is None else f"{rate:.2f} bytes"
    bytes_text = "" if tokens is None or rate is None else f" = {tokens * rate:,.0f} bytes"
    return f"{tokens_text} x {rate_text}{bytes_text}"


def _bytes_per_token(setting: Setting) -> float | None:
    """Bytes per token of the evaluated targets, or else of the whole validation split."""
    text = setting.text
    if text and text.bytes and text.tokens:
        return text.bytes / text.tokens
    rate: Any = setting.done[0].fact("data", "val", "bytes_per_token")
    return float(rate) if isinstance(rate, int | float) else None


def error_of_text(setting: Setting) -> float | None:
    """Bootstrap standard error of a setting's bits per byte over the evaluated documents, mean over
    seeds; None if a finished run has none."""
    error = setting.estimate(BITS_ERROR).interval
    return error.mean if error else None


def text_errors(settings: Sequence[Setting]) -> str:
    """The sentences that explain the text's own error; empty without errors."""
    errors = sorted(error for s in settings if (error := error_of_text(s)) is not None)
    sizes = [BY_TAG[BITS].show(error) for error in errors]
    return sentence("text_error", size=first_to_last(sizes)) if sizes else ""


def predicts_tokens(setting: Setting) -> bool:
    """Whether each depth of a setting predicts a token; true unless a finished run denies it. The
    depth of a summary head or of registers predicts no token of its own."""
    return all(run.summary.get("mtp_predicts_tokens", True) for run in setting.done)


def note_on_depths(settings: Settings) -> str:
    """A note below charts and tables on what the teacher-forced numbers of depths mean; empty if no
    run says it.

    Sequential modules read the true tokens up to i + k before they predict the next one; parallel
    and linear heads and bare targets predict it from the tokens up to i.
    """
    by_kind: dict[bool, list[str]] = {}
    for setting in settings.all:
        answers = [run.summary.get("mtp_reads_tokens") for run in setting.done if setting.depth]
        reads = answers[0] if answers and predicts_tokens(setting) else None
        if isinstance(reads, bool) and answers == [reads] * len(answers):
            by_kind.setdefault(reads, []).append(setting.name)
    remark = "".join(sentence("teacher_forced" if reads else "blind") for reads in by_kind)
    if len(by_kind) > 1:
        given, blind = (first_few(by_kind[reads]) for reads in (True, False))
        remark = sentence("two_tasks", given=given, blind=blind)
    if others := [setting.name for setting in settings.all if not predicts_tokens(setting)]:
        remark = f"{remark} {sentence('no_tokens', others=first_few(others))}"
    return remark.lstrip()

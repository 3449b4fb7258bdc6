"""Which settings were evaluated on one text, and the sentence that refuses to compare others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sweeps.report.metrics import some
from sweeps.report.settings import Setting

REMEDY = (
    "To compare them give all runs the same data, data.val_fraction, data.split_seed and "
    "data.eval_bytes, and let them evaluate all of it; or measure them with evaluate.py on one "
    "text."
)
REMEDY_OF_TASKS = "To compare them give all runs the same data, data.task.* and data.eval_examples."


def same_text(one: Setting, other: Setting) -> bool:
    """Whether what is measured on the evaluation text may be compared between two settings."""
    return bool(_text(one) == _text(other))


def by_text(settings: Iterable[Setting]) -> list[list[Setting]]:
    """The settings that have finished runs, those together that may be compared."""
    groups: dict[Any, list[Setting]] = {}
    for setting in settings:
        if setting.done:
            groups.setdefault(_text(setting), []).append(setting)
    return list(groups.values())


def refusal(settings: Sequence[Setting]) -> str:
    """What is not compared, why, and what would help; empty where all are of one text."""
    groups = by_text(settings)
    if len(groups) < 2:
        return ""
    named: dict[str, list[Setting]] = {}
    for group in groups:
        named.setdefault(_name(group[0]), []).extend(group)
    parts = [
        f"{name}{_bytes(group)}: {some([setting.label for setting in group])}"
        for name, group in named.items()
    ]
    if all(setting.answers for group in groups for setting in group):
        return (
            "The settings were asked different questions, so nothing that is measured on these "
            "(val/*, decode/*) is averaged, tested or ranked across them. Asked were "
            f"{some(parts, between=' | ')}. {REMEDY_OF_TASKS}"
        )
    return (
        "The settings were evaluated on different texts, so nothing that is measured on these "
        "(val/*, decode/*) is averaged, tested or ranked across them. Evaluated on "
        f"{some(parts, between=' | ')}. {REMEDY}"
    )


def _text(setting: Setting) -> Any:
    """Equal for settings of one text. Runs that do not mention their text are together, as they
    always were; a part that has no digest is like no other's."""
    text = setting.text
    return "" if text is None else text.fingerprint or id(setting)


def _name(setting: Setting) -> str:
    if setting.answers and setting.text and setting.text.fingerprint:
        return f"questions {setting.text.short}"
    if setting.text is None:
        return "a text that older runs do not mention"
    if setting.text.fingerprint is None:
        return "an unknown text, or a part of one that each has for itself"
    return f"text {setting.text.short}"


def _bytes(group: Sequence[Setting]) -> str:
    counts = sorted({s.text.bytes for s in group if s.text and s.text.bytes is not None})
    if not counts:
        return ""
    least = f"{counts[0]:,} to " if len(counts) > 1 else ""
    return f" ({least}{counts[-1]:,} bytes)"

"""Figures with their words, before they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sweeps.report.chart import Drawing
from sweeps.report.comparable import meaning, text_errors
from sweeps.report.metrics import BITS
from sweeps.report.names import sentence, texts
from sweeps.report.settings import Setting, Settings


def drawing_of(settings: Settings, of: str, *, name: str = "", **values: Any) -> Drawing:
    """A figure without its chart.

    Args:
        of: the name of its words.
        name: the name of its files, if it is another one.
        values: what stands for the names in braces, besides those of every figure.
    """
    words = texts("figures")[of]
    known = {
        "level": f"{settings.level:g}",
        "unit": settings.headline.unit,
        "seeds": sentence("seeds"),
        "meaning": meaning(settings),
        "text_error": text_error(settings, settings.all),
    }
    title, caption, x, y = (
        words.get(key, "").format(**{**known, **values}).strip()
        for key in ("title", "caption", "x", "y")
    )
    return Drawing(name or of, title, caption, x, y)


def text_error(settings: Settings, shown: Sequence[Setting]) -> str:
    """The text's own error, which intervals over seeds leave out; empty for losses per token."""
    return text_errors(shown) if settings.headline.tag == BITS else ""

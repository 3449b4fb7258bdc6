"""The words of figures and tables, which are in ``texts.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mtp_lightning.run.config import read_yaml
from sweeps.report.chart import Drawing
from sweeps.report.comparable import meaning, text_errors
from sweeps.report.metrics import BITS
from sweeps.report.settings import Setting, Settings

SEEDS = "Error bars are 95 % intervals over seeds; a point without one has one seed."


@cache
def texts() -> dict[str, dict[str, Any]]:
    """The content of ``texts.yaml``: ``figures`` and ``tables``."""
    found: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_suffix(".yaml"))
    return found


def drawing_of(settings: Settings, of: str, *, name: str = "", **values: Any) -> Drawing:
    """A figure without its chart.

    Args:
        of: the name of its words.
        name: the name of its files, if it is another one.
        values: what stands for the names in braces, besides those of every figure.
    """
    words = texts()["figures"][of]
    known = {
        "level": f"{settings.level:g}",
        "unit": settings.headline.unit,
        "seeds": SEEDS,
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

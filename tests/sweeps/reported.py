"""What a report makes of a folder of runs, without its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweeps.report.chart import Drawing, styled
from sweeps.report.collect import collect
from sweeps.report.compare import Comparison
from sweeps.report.figures import draw
from sweeps.report.read import read_sweep
from sweeps.report.settings import Settings
from sweeps.report.tables import Cell, of_settings


def collected(folder: Path, **options: Any) -> Settings:
    """The settings of a folder's runs."""
    return collect([read_sweep(folder)], **options)


def drawings(of: Path | Settings, comparisons: Sequence[Comparison] = ()) -> dict[str, Drawing]:
    """All figures of a report of a folder or of settings, by name."""
    settings = collected(of) if isinstance(of, Path) else of
    with styled():
        return {drawing.name: drawing for drawing in draw(settings, comparisons)}


def cells(folder: Path) -> list[Cell]:
    """All cells of the table of settings."""
    return [cell for row in of_settings(collected(folder), []).rows for cell in row]

"""How far a run is, read from its ``metrics.csv`` while it runs."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from sweeps.layout import METRICS_FILE


@dataclass(frozen=True)
class Progress:
    """The newest row with a training loss.

    Attributes:
        step: optimizer steps done; 0 before the first row.
        loss: L of that step; NaN where there is none.
    """

    step: int = 0
    loss: float = math.nan


def read_column(folder: Path, tag: str) -> dict[int, float]:
    """One column of ``metrics.csv`` by step; a torn last line and empty cells are left out.

    Args:
        folder: of the run.
        tag: a log tag.
    """
    try:
        text = (folder / METRICS_FILE).read_text(encoding="utf-8")
    except OSError:
        return {}
    found: dict[int, float] = {}
    for row in csv.DictReader(text.split("\n")[:-1]):
        value, step = row.get(tag), row.get("step")
        if value and step and step.isdigit():
            found[int(step)] = float(value)
    return found


def read_progress(folder: Path, *, tail: int = 4096) -> Progress:
    """Where the run is; reads the head and the tail of the file only.

    Args:
        folder: of the run.
        tail: bytes at the end that are looked at.
    """
    try:
        with (folder / METRICS_FILE).open("rb") as file:
            head = file.readline().decode("utf-8", errors="replace").strip().split(",")
            file.seek(max(file.tell(), file.seek(0, 2) - tail))
            lines = file.read().decode("utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return Progress()
    for line in reversed(lines):
        row = dict(zip(head, line.split(","), strict=False))
        if row.get("step", "").isdigit() and row.get("train/loss"):
            try:
                return Progress(int(row["step"]), float(row["train/loss"]))
            except ValueError:  # the middle of a line at the edge of the tail
                continue
    return Progress()

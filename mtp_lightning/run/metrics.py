"""``metrics.csv``: one row per step, one column per log tag. Numbers are read back to the last bit.

A row that is incomplete, because it is being written or a kill interrupted it, is ignored.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mtp_lightning.run.atomic import replacing

STEP = "step"

Row = dict[str, str]


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read the rows of a ``metrics.csv`` without empty cells. ``step`` is an int, the other values
    are floats.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: has the run logged anything yet?")
    rows = (_numbers(row) for row in _whole_rows(path.read_bytes()))
    return [row for row in rows if row is not None]


def read_newest(path: Path, tag: str) -> tuple[int, float] | None:
    """Read step and value of the newest row that has a tag; None if there is no such row or file.
    No more of the file's end is read than that row needs, since a run is looked at often."""
    with suppress(OSError), path.open("rb") as file:
        head, tail = file.readline(), 4096
        first = file.tell()
        start = end = file.seek(0, os.SEEK_END)
        while start > first and tag.encode() in head:
            start = file.seek(max(first, end - tail))
            if start > first:
                file.readline()  # the rest of a row
            for row in map(_numbers, reversed(_whole_rows(head + file.read()))):
                if row is not None and tag in row:
                    return int(row[STEP]), row[tag]
            tail *= 2
    return None


class MetricsFile:
    """Writes a ``metrics.csv``, or continues an existing one.

    The columns are ``step`` and every tag seen so far. Rows are appended and passed to the system
    at once, so that a killed process loses no finished row. Values of one step (train and
    validation) share a row. A new tag rewrites the file with one more column. Floats are written by
    ``repr``, which reads back as the same double; a missing value is an empty cell.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns = [STEP]
        self._row: Row = {}  # the newest row, to which later values of its step are added
        self._row_start = 0  # the offset of that row in the file
        self._opened = False
        self._last_step: int | None = None

    def resume_from(self, step: int) -> None:
        """Drop the rows after ``step``, since the resumed run does those steps again."""
        self._last_step = step
        self._opened = False

    def write(self, values: Mapping[str, Any], step: int) -> None:
        """Add values to the row of ``step``."""
        self._open()
        texts = {tag: _text(value) for tag, value in values.items() if tag != STEP}
        merge = self._row.get(STEP) == str(step)
        row = {**self._row, **texts} if merge else {STEP: str(step), **texts}
        new = [tag for tag in texts if tag not in self._columns]
        if new:
            self._columns += new
            self._rewrite(self._rows())
        self._write_row(row, replace=merge)

    def _open(self) -> None:
        """Read an existing file; drop rows after the resumed step and an incomplete last line."""
        if self._opened:
            return
        self._opened = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self._rows()
        if rows:
            self._columns = list(rows[0])
        if self._last_step is not None:
            rows = [row for row in rows if int(row[STEP]) <= self._last_step]
        self._rewrite(rows)

    def _rows(self) -> list[Row]:
        return _whole_rows(self.path.read_bytes()) if self.path.exists() else []

    def _rewrite(self, rows: list[Row]) -> None:
        lines = [_line(row.get(tag, "") for tag in self._columns) for row in rows]
        with replacing(self.path) as temporary, open(temporary, "wb") as file:
            file.write(_line(self._columns))
            for line in lines:
                self._row_start = file.tell()
                file.write(line)
        self._row = {tag: text for tag, text in rows[-1].items() if text} if rows else {}

    def _write_row(self, row: Row, *, replace: bool) -> None:
        line = _line(row.get(tag, "") for tag in self._columns)
        with open(self.path, "r+b") as file:
            if replace:
                # In place, so that a reader never misses the row. The rest of a longer old line is
                # cut off; a reader that comes before sees a row with too many cells, and skips it.
                file.seek(self._row_start)
                file.write(line)
                file.truncate()
            else:
                self._row_start = file.seek(0, os.SEEK_END)
                file.write(line)
        self._row = row


def _whole_rows(content: bytes) -> list[Row]:
    """The rows of a file, without a last line that has no newline yet."""
    table = list(csv.reader(content.decode("utf-8", errors="replace").split("\n")[:-1]))
    if not table or table[0][:1] != [STEP]:
        return []
    head = table[0]
    return [
        dict(zip(head, cells, strict=True))
        for cells in table[1:]
        if len(cells) == len(head) and cells[0].lstrip("-").isdigit()
    ]


def _numbers(row: Row) -> dict[str, float] | None:
    """The numbers of the cells that are not empty; None if a damaged cell is not a number."""
    try:
        return {t: int(c) if t == STEP else float(c) for t, c in row.items() if c}
    except ValueError:
        return None


def _text(value: Any) -> str:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return str(int(value))
    return repr(value) if isinstance(value, int) else repr(float(value))


def _line(cells: Iterable[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()

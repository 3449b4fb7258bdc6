"""`metrics.csv`: one row a step, one column a log tag, numbers that survive the round trip to the
last bit."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

STEP = "step"


class MetricsCSV(Logger):
    """Writes `folder/metrics.csv`.

    The columns are `step` and every tag seen so far. Rows are appended and handed to the system at
    once, so that a killed process loses no finished row. Values of one step (train and validation)
    share a row. A new tag rewrites the file under a temporary name with one more column. Floats are
    written by `repr`, which reads back as the same double; a missing value is an empty cell.

    Args:
        folder: the run folder.
        resume_from_step: see `resume_from`; null keeps the rows of an earlier process.
        name: the file's name.
    """

    def __init__(
        self, folder: str | Path, resume_from_step: int | None = None, name: str = "metrics.csv"
    ) -> None:
        super().__init__()
        self.path = Path(folder) / name
        self._columns: list[str] = [STEP]
        self._row: dict[str, str] = {}  # the newest row, which more values of its step may join
        self._row_start = 0  # where it begins in the file
        self._opened = False
        self._resume_step = resume_from_step

    @property
    def name(self) -> str:
        """Empty: the file lies in the run folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the file lies in the run folder itself."""
        return ""

    def resume_from(self, step: int) -> None:
        """Drop the rows after `step`, the last one that the resumed run does not do again."""
        self._resume_step = step
        self._opened = False

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds the composed configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of `step`.

        Raises:
            ValueError: when there is no step.
        """
        if step is None:
            raise ValueError("metrics.csv needs the step that values belong to, but it is None.")
        self._open()
        values = {tag: _text(value) for tag, value in metrics.items() if tag != STEP}
        merge = self._row.get(STEP) == str(int(step))
        row = {**self._row, **values} if merge else {STEP: str(int(step)), **values}
        new = [tag for tag in values if tag not in self._columns]
        if new:
            self._columns += new
            self._rewrite(self._read_rows())
        self._write_row(row, replace=merge)

    def _open(self) -> None:
        """Take over the file that is there: without rows after the resumed step, without a torn
        last line."""
        if self._opened:
            return
        self._opened = True
        self._columns, self._row, self._row_start = [STEP], {}, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self._read_rows()
        if rows:
            self._columns = list(rows[0])
        if self._resume_step is not None:
            rows = [row for row in rows if int(row[STEP]) <= self._resume_step]
        self._rewrite(rows)

    def _read_rows(self) -> list[dict[str, str]]:
        """The whole rows of the file; a last line that a kill has torn is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")[
            :-1
        ]  # what no newline ends is torn
        table = list(csv.reader(lines))
        if not table or table[0][:1] != [STEP]:
            return []
        head = table[0]
        return [
            dict(zip(head, cells, strict=True))
            for cells in table[1:]
            if len(cells) == len(head) and cells[0].lstrip("-").isdigit()
        ]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(self._line(self._columns))
            for row in rows:
                self._row_start = file.tell()
                file.write(self._line([row.get(tag, "") for tag in self._columns]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._row = {tag: text for tag, text in rows[-1].items() if text} if rows else {}

    def _write_row(self, row: dict[str, str], *, replace: bool) -> None:
        line = self._line([row.get(tag, "") for tag in self._columns]).encode()
        with open(self.path, "r+b") as file:
            if replace:
                # the longer line overwrites the shorter in place: no moment at which the row is
                # missing
                file.seek(self._row_start)
                file.write(line)
                file.truncate()
            else:
                self._row_start = file.seek(0, os.SEEK_END)
                file.write(line)
        self._row = row

    @staticmethod
    def _line(cells: list[str]) -> str:
        # tags and numbers need no quotes, but a tag of another's making may
        quoted = [
            '"' + c.replace('"', '""') + '"' if any(x in c for x in ',"') else c for c in cells
        ]
        return ",".join(quoted) + "\n"


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv` with the values they have: `step` an int, the others floats."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: has the run logged anything yet?")
    rows = MetricsCSV(path.parent, name=path.name)._read_rows()
    return [
        {tag: int(text) if tag == STEP else float(text) for tag, text in row.items() if text}
        for row in rows
    ]


def _text(value: Any) -> str:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return str(int(value))
    return repr(value) if isinstance(value, int) else repr(float(value))

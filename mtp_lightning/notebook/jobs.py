"""Starts a sweep, and shows its folder as an object: its runs, side by side."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_lightning.notebook.calls import output_folder
from mtp_lightning.notebook.process import start
from mtp_lightning.notebook.run import Run
from mtp_lightning.paths import app
from mtp_lightning.run.layout import SUMMARY_FILE, SWEEP_FILE
from mtp_lightning.run.status import read_status
from mtp_lightning.stored import read_json

if TYPE_CHECKING:
    from pandas import DataFrame


class Sweep:
    """The files of a sweep's folder, read again at every use.

    Args:
        folder: the sweep's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def runs(self) -> list[Run]:
        """All runs of the sweep, in its order.

        Raises:
            FileNotFoundError: if there is no sweep.
        """
        return [Run(self.folder / job["folder"]) for job in self._plan["jobs"]]

    @property
    def table(self) -> DataFrame:
        """One row per run: its state, the overrides in which runs differ, and its summary's
        numbers."""
        from pandas import DataFrame

        varied = self._plan["varied"]
        rows, index = [], []
        for job, run in zip(self._plan["jobs"], self.runs, strict=True):
            status = read_status(run.folder)
            told = dict(override.partition("=")[::2] for override in job["overrides"])
            row: dict[str, Any] = {"state": "pending" if status is None else status["state"]}
            row |= {key: told.get(key) for key in varied}
            if (run.folder / SUMMARY_FILE).is_file():
                numbers = run.summary.items()
                row |= {k: v for k, v in numbers if isinstance(v, int | float) and k not in row}
            rows.append(row)
            index.append(job["folder"])
        return DataFrame(rows, index=index)

    def report(self) -> Path:
        """``python -m sweeps.report``: means, intervals, tests and figures, as one page.

        Returns:
            The page's file.
        """
        start(["-m", "sweeps.report", str(self.folder)], quiet=True)
        return self.folder / "report.html"

    @property
    def _plan(self) -> dict[str, Any]:
        file = self.folder / SWEEP_FILE
        if not file.is_file():
            raise FileNotFoundError(f"There is no sweep in {self.folder}: it has no {SWEEP_FILE}.")
        plan: dict[str, Any] = read_json(file)
        return plan

    def __repr__(self) -> str:
        return f"Sweep({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        return f"<b>{html.escape(str(self.folder))}</b>{self.table._repr_html_()}"


def sweep(*overrides: str, quiet: bool = False) -> Sweep:
    """``python train.py -m OVERRIDES``: a run for every combination of comma-separated values.

    Args:
        overrides: as on the command line: ``"mtp.depth=0,2"``, ``"seed=0,1,2"``.
        quiet: show no output.

    Raises:
        RuntimeError: if it, or one of its jobs, failed.
    """
    folder, given = output_folder("sweep_dir", "runs/sweep_{}", overrides)
    start([*app("train"), "-m", *given], quiet=quiet)
    return Sweep(folder)

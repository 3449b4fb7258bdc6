"""The calls of a notebook, and the folders of runs and sweeps as objects."""

from __future__ import annotations

import html
import json
import os
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_lightning.command_line.quote import quoted
from mtp_lightning.errors import UserError
from mtp_lightning.notebook.process import start
from mtp_lightning.notebook.text import Text
from mtp_lightning.paths import app
from mtp_lightning.run.config import flatten, read_yaml, values_by_key
from mtp_lightning.run.layout import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, SWEEP_FILE
from mtp_lightning.run.metrics import read_metrics
from mtp_lightning.run.status import state_of
from mtp_lightning.stored import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

# The names under which a notebook shows a run's metrics, if it has them.
_SHOWN = {
    "val/bits_per_byte": "bits per byte",
    "val/exact_match": "exact match",
    "val/loss_depth_0": "loss, next token",
    "val/loss_depth_1": "loss, depth 1",
    "val/loss_depth_2": "loss, depth 2",
    "decode/acceptance_position_1": "first draft accepted",
    "decode/tokens_per_step": "tokens per pass",
    "parameters": "parameters",
    "tokens": "tokens",
}


class _Folder:
    """The files of the folder of a run or sweep, read again at every use."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()  # a notebook may change its folder

    def _read(self, name: str, missing: str) -> dict[str, Any]:
        if not (self.folder / name).is_file():
            raise FileNotFoundError(missing)
        return read_json(self.folder / name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    def _with_title(self, table: str) -> str:
        return f"<b>{html.escape(str(self.folder))}</b>{table}"


class Run(_Folder):
    """The files of a run's folder, read again at every use."""

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json``: every final metric, and the cost of the run.

        Raises:
            FileNotFoundError: if the run has not ended.
        """
        file = self.folder / SUMMARY_FILE
        return self._read(SUMMARY_FILE, f"There is no {file}: the run has not ended yet.")

    @property
    def metrics(self) -> DataFrame:
        """All logged values: one row per step, one column per log tag, NaN for missing values."""
        from pandas import DataFrame

        rows: Any = read_metrics(self.folder / METRICS_FILE) or {"step": []}
        return DataFrame(rows).set_index("step").sort_index()

    def plot(self, *tags: str) -> Figure:
        """Curves over the steps; by default the losses of every depth, and the acceptance of
        drafts.

        Args:
            tags: log tags (``train/loss_depth_0``), all in one picture.

        Raises:
            KeyError: for a tag that the run has not logged.
            UserError: for the default before the first validation.
        """
        from mtp_lightning.notebook.curves import draw, draw_overview

        metrics = self.metrics
        if unknown := [tag for tag in tags if tag not in metrics]:
            raise KeyError(f"{unknown[0]} is not logged; there are {', '.join(metrics.columns)}")
        if not tags and "val/loss_depth_0" not in metrics:
            raise UserError(f"{self.folder} has no validation to draw yet: wait, or name log tags.")
        return draw(metrics, tags) if tags else draw_overview(metrics)

    def generate(self, prompt: str, **options: Any) -> Text:
        """The prompt's continuation by the run's best checkpoint; ``options`` are keys of
        ``generate.py``: ``max_new_tokens``, ``temperature``, ..."""
        options = {"checkpoint": str(self.folder), "prompt": prompt, **options}
        return generate(*(f"{key}={_typed(value)}" for key, value in options.items()))

    def evaluate(self, *overrides: str) -> dict[str, Any]:
        """Metrics of the run's best checkpoint, on its own evaluation text or, by overrides of
        ``evaluate.py`` (``data=``), on another."""
        return evaluate(f"checkpoint={self.folder}", *overrides)

    def _repr_html_(self) -> str:
        cells = {"": "not ended yet"}
        if (self.folder / SUMMARY_FILE).is_file():
            values = {name: self.summary.get(tag) for tag, name in _SHOWN.items()}
            numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
            cells = {k: f"{v:,}" if isinstance(v, int) else f"{v:.4g}" for k, v in numbers.items()}
        row = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td><td>{value}</td></tr>"
            for name, value in cells.items()
        )
        return self._with_title(f"<table>{row}</table>")


class Sweep(_Folder):
    """The files of a sweep's folder, read again at every use."""

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

        plan = self._plan
        rows = {}
        for job, run in zip(plan["jobs"], self.runs, strict=True):
            typed: dict[str, Any] = {**values_by_key(job["overrides"])}
            if (file := run.folder / CONFIG_FILE).is_file():  # has numbers where words were typed
                typed |= flatten(read_yaml(file))
            row: dict[str, Any] = {"state": state_of(run.folder)}
            row |= {key: typed.get(key) for key in plan["varied"]}
            if (run.folder / SUMMARY_FILE).is_file():
                numbers = run.summary.items()
                row |= {k: v for k, v in numbers if isinstance(v, int | float) and k not in row}
            rows[job["folder"]] = row
        return DataFrame(list(rows.values()), index=list(rows))

    def report(self) -> Path:
        """``python -m sweeps.report``: means, intervals, tests and figures, as one page, whose file
        is returned."""
        start(["-m", "sweeps.report", str(self.folder)], quiet=True)
        return self.folder / "report.html"

    @property
    def _plan(self) -> dict[str, Any]:
        return self._read(SWEEP_FILE, f"There is no sweep in {self.folder}: no {SWEEP_FILE}.")

    def _repr_html_(self) -> str:
        return self._with_title(str(self.table._repr_html_()))


def train(*overrides: str, quiet: bool = False) -> Run:
    """``python train.py OVERRIDES``: a run, or the rest of one if its ``run_dir`` is given again.

    Args:
        overrides: as on the command line: ``"mtp.depth=2"``, ``"data=text"``.
        quiet: show no output.

    Raises:
        RuntimeError: if it failed, with one sentence.
    """
    folder, arguments = _output_folder("run_dir", "runs/{}", overrides)
    start([*app("train"), *arguments], quiet=quiet)
    return Run(folder)


def sweep(*overrides: str, quiet: bool = False) -> Sweep:
    """``python train.py -m OVERRIDES``: a run for every combination of comma-separated values, such
    as ``"mtp.depth=0,2"`` and ``"seed=0,1,2"``; the arguments are those of :func:`train`.

    Raises:
        RuntimeError: if it, or one of its jobs, failed.
    """
    folder, arguments = _output_folder("sweep_dir", "runs/sweep_{}", overrides)
    start([*app("train"), "-m", *arguments], quiet=quiet)
    return Sweep(folder)


def evaluate(*overrides: str, quiet: bool = True) -> dict[str, Any]:
    """``python evaluate.py OVERRIDES``: the metrics of a trained model by log tag.

    Args:
        overrides: as on the command line: ``"checkpoint=runs/mine"``.
        quiet: show no output.

    Raises:
        RuntimeError: if it failed, with one sentence.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Hydra takes the last of two values.
        output = Path(_value("output", overrides) or f"{folder}/metrics.json")
        start([*app("evaluate"), *overrides, f"output={output}"], quiet=quiet)
        return read_json(output)


def generate(*overrides: str) -> Text:
    """``python generate.py OVERRIDES`` for one prompt, in this process.

    Args:
        overrides: as on the command line: ``"checkpoint=runs/mine"``, ``"prompt=def main("``.

    Raises:
        UserError: for a missing prompt, a damaged or unknown checkpoint, or a wrong option.
        OSError: if there is no such checkpoint.
    """
    from mtp_lightning.experiment.compose import checked_config
    from mtp_lightning.experiment.generating import (
        checked_prompts,
        continue_prompts,
        decoding_options,
        open_from_config,
    )

    cfg = checked_config(overrides, "generate")
    if cfg.prompt is None:
        raise UserError("There is no prompt: give prompt=TEXT.")
    (prompt,) = checked_prompts(cfg)
    if cfg.output != "text":
        raise UserError(f"output={cfg.output} is what generate.py prints: leave it out here.")
    run = open_from_config(cfg)
    (generation,) = continue_prompts(run, [prompt], decoding_options(cfg, run, rows=1))
    return Text(prompt, generation, run.tokenizer)


def _output_folder(key: str, pattern: str, overrides: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder that a call writes to, and the overrides with that folder."""
    value = _value(key, overrides)
    if value is not None:
        return Path(value), list(overrides)
    folder = Path(pattern.format(datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")))
    return folder, [*overrides, f"{key}={folder}"]


def _value(key: str, overrides: Sequence[str]) -> str | None:
    """The path that the last override of a key gives; None if there is none."""
    path = values_by_key(overrides).get(key)
    if path is None:
        return None
    if "${" in path:
        raise UserError(f"{key}={path} is resolved only inside the run: give the path itself.")
    in_quotes = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""
    return os.path.expanduser(path[1:-1] if in_quotes else path)


def _typed(value: Any) -> str:
    """A value in the command line's syntax."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_typed, value))}]"
    return quoted(value) if isinstance(value, str) else str(value)

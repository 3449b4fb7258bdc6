"""Starts a run, and shows its folder as an object: its numbers, its curves, its text."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_lightning.notebook.calls import evaluate, generate, output_folder
from mtp_lightning.notebook.process import start
from mtp_lightning.notebook.text import Text
from mtp_lightning.paths import app
from mtp_lightning.run.layout import METRICS_FILE, SUMMARY_FILE
from mtp_lightning.run.metrics import read_metrics
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
    "decode/tokens_per_step": "tokens per verify pass",
    "parameters": "parameters",
    "tokens": "tokens",
}


class Run:
    """The files of a run's folder, read again at every use.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json``: every final metric, and the cost of the run.

        Raises:
            FileNotFoundError: if the run has not ended.
        """
        file = self.folder / SUMMARY_FILE
        if not file.is_file():
            raise FileNotFoundError(f"There is no {file}: the run has not ended yet.")
        found: dict[str, Any] = read_json(file)
        return found

    @property
    def metrics(self) -> DataFrame:
        """All logged values: one row per step, one column per log tag, NaN for missing values."""
        from pandas import DataFrame

        return DataFrame(read_metrics(self.folder / METRICS_FILE)).set_index("step").sort_index()

    def plot(self, *tags: str) -> Figure:
        """Curves over the steps; by default the losses of every depth, and the acceptance of
        drafts.

        Args:
            tags: log tags (``train/loss_depth_0``), all in one picture.

        Raises:
            KeyError: for a tag that the run has not logged.
        """
        from mtp_lightning.notebook.curves import draw, draw_overview

        metrics = self.metrics
        if unknown := [tag for tag in tags if tag not in metrics]:
            raise KeyError(f"{unknown[0]} is not logged; there are {', '.join(metrics.columns)}")
        return draw(metrics, tags) if tags else draw_overview(metrics)

    def generate(self, prompt: str, **options: Any) -> Text:
        """Text from the run's best checkpoint.

        Args:
            prompt: text to continue.
            options: keys of ``generate.py``: ``max_new_tokens``, ``temperature``, ...
        """
        given = (f"{key}={_typed(value)}" for key, value in options.items())
        return generate(f"checkpoint={self.folder}", f"prompt={prompt}", *given)

    def evaluate(self, *overrides: str) -> dict[str, Any]:
        """Metrics of the run's best checkpoint, on its own evaluation text or another (``data=``).

        Args:
            overrides: overrides of ``evaluate.py``.
        """
        return evaluate(f"checkpoint={self.folder}", *overrides)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        try:
            cells = _shown(self.summary)
        except FileNotFoundError:
            cells = {"": "not ended yet"}
        row = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td><td>{value}</td></tr>"
            for name, value in cells.items()
        )
        return f"<b>{html.escape(str(self.folder))}</b><table>{row}</table>"


def train(*overrides: str, quiet: bool = False) -> Run:
    """``python train.py OVERRIDES``: a run, or the rest of one if its ``run_dir`` is given again.

    Args:
        overrides: as on the command line: ``"mtp.depth=2"``, ``"data=text"``.
        quiet: show no output.

    Raises:
        RuntimeError: if it failed, with one sentence.
    """
    folder, given = output_folder("run_dir", "runs/{}", overrides)
    start([*app("train"), *given], quiet=quiet)
    return Run(folder)


def _shown(summary: Mapping[str, Any]) -> dict[str, str]:
    """The most important numbers of a summary."""
    found = {name: summary.get(tag) for tag, name in _SHOWN.items()}
    found = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return {k: f"{v:,}" if isinstance(v, int) else f"{v:.4g}" for k, v in found.items()}


def _typed(value: Any) -> str:
    """A value in the command line's syntax."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)

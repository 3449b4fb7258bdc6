"""TensorBoard events in the run folder, with charts that show all depths together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mtp_lightning.loggers.base import RunLogger


class RunTensorBoard(RunLogger, TensorBoardLogger):
    """TensorBoard events directly in the run folder, so that `tensorboard --logdir SWEEP` lists one
    run per job. Custom charts group the depths 0 .. D (``depth``)."""

    def __init__(self, folder: str | Path, depth: int, flush_secs: float = 30) -> None:
        TensorBoardLogger.__init__(
            self,
            save_dir=str(folder),
            name="",
            version="",
            default_hp_metric=False,
            flush_secs=flush_secs,
        )
        self.depth = depth
        self._layout_written = False
        self._logged_at: dict[str, int | None] = {}  # step of the newest value of each tag

    def resume_from(self, step: int) -> None:
        """Hides the events after `step`, the last step that the resumed run does not repeat."""
        # TensorBoard hides what an earlier process wrote at purge_step or later; the writer is
        # opened lazily.
        self._kwargs["purge_step"] = step + 1

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not self._layout_written:
            self.experiment.add_custom_scalars(_depth_layout(self.depth))
            self._layout_written = True
        super().log_metrics(metrics, step)
        self._logged_at.update(dict.fromkeys(metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Puts the run into the HPARAMS tab, by config key.

        Unlike Lightning and PyTorch, it writes no list of columns: TensorBoard would use the first
        run's list for all runs. Without one it shows every key and metric of any run.
        """
        self.experiment._get_file_writer().add_summary(_hparams(params)[1], None)

    @rank_zero_only
    def log_final(self, params: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Puts the run into the HPARAMS tab again, as a finished run with its metrics."""
        # TensorBoard reads metrics from the newest values, most of which the charts already have.
        new = {tag: value for tag, value in metrics.items() if self._logged_at.get(tag) != step}
        if new:
            self.log_metrics(new, step)
        for record in _hparams(params)[1:]:
            self.experiment._get_file_writer().add_summary(record, None)

    @rank_zero_only
    def write_text(self, tag: str, text: str, step: int) -> None:
        """Writes a text that is shown verbatim, with its line ends."""
        as_code = "\n".join(f"    {line}" for line in text.splitlines())
        self.experiment.add_text(tag, as_code, step)

    def save(self) -> None:
        """Flushes the events, without Lightning's hparams.yaml: the run stores its whole config."""
        if self._experiment is not None:
            self.experiment.flush()


def _hparams(params: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """TensorBoard's records of a run's columns, of its values, and of its end."""
    from torch.utils.tensorboard.summary import hparams

    plain = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in params.items()
    }
    return hparams(plain, {})


def _depth_layout(depth: int) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom-scalars layout: one chart each for the losses, lambdas and rates of all
    depths, and one with 95 % intervals for each rate of decoding.

    Tags are patterns, so that runs of different D have the same charts: TensorBoard shows the
    charts of all runs, and equal ones once. A chart with intervals takes no patterns.
    """
    charts = {
        "train loss": "train/loss",
        "validation loss": "val/loss",
        "validation accuracy": "val/accuracy",
    }
    rates = {}
    if depth:
        charts["lambda"] = "train/lambda"
        charts["validation agreement"] = "val/agreement"
        charts["validation overlap"] = "val/overlap"
        rates["tokens per pass"] = "tokens_per_step"
    for j in range(1, depth + 1):
        rates[f"acceptance at position {j}"] = f"acceptance_position_{j}"
    lines = {title: ["Multiline", [rf"{tag}_depth_\d+$"]] for title, tag in charts.items()}
    margins = {
        title: ["Margin", [f"decode/{rate}{end}" for end in ("", "_low", "_high")]]
        for title, rate in rates.items()
    }
    return {"depths": lines | margins}

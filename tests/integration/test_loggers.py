"""Loggers in a real run: they get all values, and a failing one costs one warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from mtp_lightning.experiment import trainer
from mtp_lightning.loggers.base import RunLogger
from mtp_lightning.loggers.csv import MetricsCSV
from mtp_lightning.run.metrics import read_metrics
from tests.integration.helpers import column, config, rows, summary_of, train_here


class Witness(RunLogger):
    """Notes for every call whether ``summary.json`` existed."""

    def __init__(self, folder: Path, fails: str = "") -> None:
        self.folder = folder
        self.fails = fails
        self.calls: list[tuple[str, bool]] = []
        self.params: dict[str, Any] = {}
        self.final: dict[str, float] = {}
        self.texts: list[str] = []
        self.resumed: int | None = None

    name = version = ""

    def note(self, method: str) -> None:
        self.calls.append((method, (self.folder / "summary.json").exists()))
        if method == self.fails:
            raise OSError("the disk of the logger is full")

    def resume_from(self, step: int) -> None:
        self.resumed = step

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.params = params
        self.note("log_hyperparams")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.note("log_metrics")

    def write_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append(text)

    def log_final(self, params: Any, metrics: dict[str, float], step: int) -> None:
        self.final = metrics
        self.note("log_final")

    def finalize(self, status: str) -> None:
        self.note(f"finalize {status}")


def train_with_loggers(
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    loggers: dict[str, Any],
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A quick run with loggers that conf/ does not have; an error in place of one is raised."""
    from mtp_lightning.experiment.training import train

    original = trainer.instantiate

    def instantiate(node: Any, **more: Any) -> Any:
        if "which" not in node:
            return original(node, **more)
        logger = loggers[node.which]
        if isinstance(logger, Exception):
            raise logger
        return logger

    cfg = config(folder, cache, settings)
    cfg.logger = {name: {"which": name} for name in loggers}
    monkeypatch.setattr(trainer, "instantiate", instantiate)
    return train(cfg)


def test_loggers_get_the_final_values_after_summary_json(tmp_path, cache, monkeypatch):
    # With a validation after the last step: Lightning calls finalize twice.
    witness = Witness(tmp_path)
    settings = {"trainer.max_steps": 7, "callbacks.speculative_eval.new_tokens": 4}
    summary = train_with_loggers(tmp_path, cache, monkeypatch, {"witness": witness}, settings)
    after = [call for call, summarized in witness.calls if summarized]
    assert after == ["log_final", "finalize success"]
    assert [call for call, _ in witness.calls].count("finalize success") == 1
    assert witness.params == {"mtp.depth": 2, "mtp_lambda": 0.3, "seed": 0}
    assert witness.final["val/loss_depth_0"] == summary["val/loss_depth_0"]
    assert len(witness.texts) == 2 and witness.resumed is None
    # metrics.csv is written without a logger for it.
    assert column(tmp_path, "train/loss").keys() == set(range(1, 8))
    assert summary_of(tmp_path)["step"] == 7


def warning(caplog: pytest.LogCaptureFixture) -> str:
    """The one warning about loggers."""
    (record,) = [r for r in caplog.records if r.name.startswith("mtp_lightning.loggers")]
    return record.getMessage()


@pytest.mark.parametrize("fails", ["log_metrics", "finalize success"])
def test_a_failing_logger_costs_one_warning(tmp_path, cache, monkeypatch, caplog, fails):
    witness = Witness(tmp_path, fails)
    train_with_loggers(tmp_path, cache, monkeypatch, {"witness": witness})
    message = warning(caplog)
    assert "logger.witness failed" in message and "the disk of the logger is full" in message
    assert [call for call, _ in witness.calls].count(fails) == 1
    assert (tmp_path / "summary.json").exists()
    assert len(read_metrics(tmp_path / "metrics.csv")) == 10


def test_an_unreachable_server_at_the_start_costs_one_warning(tmp_path, cache, monkeypatch, caplog):
    loggers = {"far": ConnectionRefusedError("nobody listens"), "csv": MetricsCSV(tmp_path)}
    train_with_loggers(tmp_path, cache, monkeypatch, loggers)
    assert "logger.far failed (construction: ConnectionRefusedError" in warning(caplog)
    assert (tmp_path / "summary.json").exists()


def test_a_wrong_logger_setting_ends_the_run(tmp_path, cache, monkeypatch):
    error = ValueError("logger.x.flush must be above 0, not -1.")
    with pytest.raises(ValueError, match="above 0, not -1"):
        train_with_loggers(tmp_path, cache, monkeypatch, {"far": error})


def test_lightnings_csv_logger_gets_values_and_hyperparameters(tmp_path, cache, monkeypatch):
    theirs = CSVLogger(str(tmp_path / "theirs"), name="", version="")
    train_with_loggers(tmp_path / "run", cache, monkeypatch, {"theirs": theirs})
    logged = (tmp_path / "theirs" / "metrics.csv").read_text()
    assert "train/loss_depth_2" in logged and "val/loss_depth_0" in logged
    assert "mtp_lambda: 0.3" in (tmp_path / "theirs" / "hparams.yaml").read_text()


def test_a_run_without_a_checkpoint_starts_again(tmp_path: Path, cache: Path, copied: Path) -> None:
    """Rows from before the first checkpoint are written again."""
    first = rows(tmp_path)
    for file in (tmp_path / "checkpoints").iterdir():
        file.unlink()
    train_here(tmp_path, cache)
    assert rows(tmp_path) == first

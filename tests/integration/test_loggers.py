"""Loggers in a real run: told the end after summary.json; a broken one costs nothing."""

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
    """Notes what stood in the run folder when it was told something."""

    def __init__(self, folder: Path, fails: str = "") -> None:
        self.folder = folder
        self.fails = fails
        self.told: list[tuple[str, bool]] = []
        self.params: dict[str, Any] = {}
        self.final: dict[str, float] = {}
        self.texts: list[str] = []
        self.resumed: int | None = None

    name = version = ""

    def note(self, method: str) -> None:
        self.told.append((method, (self.folder / "summary.json").exists()))
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


def train_with(
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    loggers: dict[str, Any],
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A quick run with loggers that conf/ does not have; an error in place of one is raised."""
    from mtp_lightning.experiment.training import train

    others = trainer.instantiate

    def instantiate(node: Any, **more: Any) -> Any:
        if "which" not in node:
            return others(node, **more)
        made = loggers[node.which]
        if isinstance(made, Exception):
            raise made
        return made

    cfg = config(folder, cache, settings)
    cfg.logger = {name: {"which": name} for name in loggers}
    monkeypatch.setattr(trainer, "instantiate", instantiate)
    return train(cfg)


def test_the_end_is_told_after_the_summary(tmp_path, cache, monkeypatch):
    # A validation of its own after the last step: Lightning says twice that something has ended.
    seen = Witness(tmp_path)
    settings = {"trainer.max_steps": 7, "callbacks.speculative_eval.new_tokens": 4}
    summary = train_with(tmp_path, cache, monkeypatch, {"seen": seen}, settings)
    assert [told for told, there in seen.told if there] == ["log_final", "finalize success"]
    assert [told for told, _ in seen.told].count("finalize success") == 1
    assert seen.params == {"mtp.depth": 2, "mtp_lambda": 0.3, "seed": 0}
    assert seen.final["val/loss_depth_0"] == summary["val/loss_depth_0"]
    assert len(seen.texts) == 2 and seen.resumed is None
    # metrics.csv is there without being asked for.
    assert column(tmp_path, "train/loss").keys() == set(range(1, 8))
    assert summary_of(tmp_path)["step"] == 7


def warned(caplog: pytest.LogCaptureFixture) -> str:
    """The one warning about loggers."""
    (record,) = [r for r in caplog.records if r.name.startswith("mtp_lightning.loggers")]
    return record.getMessage()


@pytest.mark.parametrize("fails", ["log_metrics", "finalize success"])
def test_a_broken_logger_is_a_warning(tmp_path, cache, monkeypatch, caplog, fails):
    seen = Witness(tmp_path, fails)
    train_with(tmp_path, cache, monkeypatch, {"seen": seen})
    said = warned(caplog)
    assert "logger.seen failed" in said and "the disk of the logger is full" in said
    assert [told for told, _ in seen.told].count(fails) == 1
    assert (tmp_path / "summary.json").exists()
    assert len(read_metrics(tmp_path / "metrics.csv")) == 10


def test_a_server_that_is_away_when_the_run_begins(tmp_path, cache, monkeypatch, caplog):
    loggers = {"far": ConnectionRefusedError("nobody listens"), "csv": MetricsCSV(tmp_path)}
    train_with(tmp_path, cache, monkeypatch, loggers)
    assert "logger.far failed (construction: ConnectionRefusedError" in warned(caplog)
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("logger.x.flush must be above 0, not -1."), "above 0, not -1"),
        (ModuleNotFoundError("No module named 'comet_ml'"), "logger.far needs .*comet_ml"),
    ],
)
def test_what_the_user_can_mend_ends_the_run(tmp_path, cache, monkeypatch, error, words):
    with pytest.raises(ValueError, match=words):
        train_with(tmp_path, cache, monkeypatch, {"far": error})


def test_lightnings_own_logger(tmp_path, cache, monkeypatch):
    theirs = CSVLogger(str(tmp_path / "theirs"), name="", version="")
    train_with(tmp_path / "run", cache, monkeypatch, {"theirs": theirs})
    logged = (tmp_path / "theirs" / "metrics.csv").read_text()
    assert "train/loss_depth_2" in logged and "val/loss_depth_0" in logged
    assert "mtp_lambda: 0.3" in (tmp_path / "theirs" / "hparams.yaml").read_text()


def test_a_run_without_a_checkpoint_begins_again(tmp_path: Path, cache: Path, copied: Path) -> None:
    """What a process logged before its first checkpoint is done again."""
    first = rows(tmp_path)
    for file in (tmp_path / "checkpoints").iterdir():
        file.unlink()
    train_here(tmp_path, cache)
    assert rows(tmp_path) == first

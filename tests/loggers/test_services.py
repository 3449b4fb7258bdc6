"""Weights & Biases, MLflow and Trackio with their own libraries, without a network.

They need these libraries: pip install -e '.[loggers]'.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.loggers.base import RunLogger
from mtp_lightning.loggers.csv import MetricsCSV
from mtp_lightning.loggers.mlflow import RunMLflow
from mtp_lightning.loggers.trackio import RunTrackio
from mtp_lightning.loggers.wandb import RunWandb

# The libraries' own warnings, and the files and sockets that they leave to the end of the process.
pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]

Points = dict[str, list[tuple[int, float]]]
PARAMS = {"mtp.depth": 2, "mtp_lambda": [0.3, 0.1], "mtp": "parallel"}


@pytest.fixture(autouse=True)
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format: blocks of 32 KiB, of parts with a header of 7 bytes."""
    whole, at = b"", 0
    while at + 7 <= len(log):
        room = 32768 - (at + 7) % 32768  # the mark of 7 bytes is in the first block
        if room < 7:
            at += room
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        whole += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


def wandb_content(folder: Path) -> tuple[set[str], dict[str, Any], Points]:
    """Runs, settings and values in the files of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs, config, points = set(), {}, defaultdict(list)
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()[7:]):  # after the library's own mark
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                runs.add(record.run.run_id)
            for update in record.config.update:
                config[update.key] = json.loads(update.value_json)
            row = {
                (i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item
            }
            for tag in row.keys() & {"train/loss", "val/loss", "decode/sample"}:
                points[tag].append((row["trainer/global_step"], row[tag]))
    return runs, config, points


def mlflow_content(folder: Path) -> tuple[set[str], dict[str, Any], Points]:
    """The same from the database next to the run folder."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lab")
    runs = client.search_runs([experiment.experiment_id])
    run = runs[0]
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    tags = [tag for tag in run.data.metrics if tag != "val/final"]
    points = {
        tag: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, tag)]
        for tag in tags
    }
    points["decode/sample"] = [(3, 0.0)] * len(client.list_artifacts(run.info.run_id, "decode"))
    return {run.info.run_id for run in runs}, run.data.params, points


def trackio_content(folder: Path) -> tuple[set[str], dict[str, Any], Points]:
    """The same from Trackio's database."""
    from trackio.sqlite_storage import SQLiteStorage

    runs = SQLiteStorage.get_runs("lab")
    points = defaultdict(list)
    for row in SQLiteStorage.get_logs("lab", runs[0]):
        for tag in row.keys() & {"train/loss", "val/loss", "decode/sample"}:
            points[tag].append((row["step"], row[tag]))
    return set(runs), SQLiteStorage.get_run_config("lab", runs[0]), points


SERVICES: dict[str, tuple[type[RunLogger], Callable]] = {
    "wandb": (RunWandb, wandb_content),
    "mlflow": (RunMLflow, mlflow_content),
    "trackio": (RunTrackio, trackio_content),
}


def log_steps(loggers: list[RunLogger], first: int, last: int) -> None:
    """Training at every step, and validation at every third."""
    for logger in loggers:
        logger.log_hyperparams(PARAMS)
    for step in range(first, last + 1):
        for logger in loggers:
            logger.log_metrics({"train/loss": step / 8}, step)
            if step % 3 == 0:
                logger.log_metrics({"val/loss": step / 4}, step)
                logger.write_text("decode/sample", "text|<b> of\nstep", step)


@pytest.mark.slow
@pytest.mark.parametrize("service", SERVICES)
def test_an_interrupted_run_has_every_value_once_in_one_run(service, tmp_path, monkeypatch):
    library = pytest.importorskip(service, reason=f"pip install -e '.[{service}]'")
    kind, content = SERVICES[service]
    folder = tmp_path / "run"
    if service == "trackio":
        # Read from the environment when it is imported, and by several of its modules.
        for name in ("utils", "sqlite_storage"):
            monkeypatch.setattr(getattr(library, name), "TRACKIO_DIR", tmp_path / "trackio")
    first = [kind(folder, "lab"), MetricsCSV(folder)]
    log_steps(first, 1, 4)
    first[0].finalize("failed")

    # Killed twice: what was sent is known after the cut of metrics.csv too.
    for step, last in ((1, 2), (2, 5)):
        again = [kind(folder, "lab"), MetricsCSV(folder)]
        for logger in again:
            logger.resume_from(step)
        log_steps(again, step + 1, last)
        if last == 2:
            again[0].finalize("failed")
    for logger in again:
        logger.log_final(PARAMS, {"val/final": 0.5}, 5)
        logger.finalize("success")

    runs, params, points = content(folder)
    until = time.monotonic() + 60  # on a busy machine wandb writes a little longer
    while len(points["train/loss"]) < 5 and time.monotonic() < until:
        time.sleep(0.5)
        runs, params, points = content(folder)
    assert runs == {json.loads((folder / "trackers.json").read_text())[service]}
    assert len(runs) == 1
    assert str(params["mtp.depth"]) == "2" and params["mtp"] == "parallel"
    if service == "wandb":
        library.teardown()  # ends the process that writes the file
    assert points["train/loss"] == [(step, step / 8) for step in range(1, 6)]
    assert points["val/loss"] == [(3, 0.75)]
    assert points["decode/sample"][0][0] == 3


@pytest.mark.parametrize(
    ("stored", "unsent"),
    [
        ({"trackio": "run", "trackio_sent": {"3": ["loss"]}}, set()),
        ({"trackio": "run", "trackio_sent": None}, {"loss"}),
        ({"trackio": None, "trackio_sent": {"3": ["loss"]}}, {"loss"}),
    ],
)
def test_damaged_notes_of_what_was_sent_are_ignored(stored, unsent, tmp_path, monkeypatch):
    sent: dict[str, float] = {}
    (tmp_path / "trackers.json").write_text(json.dumps(stored))
    monkeypatch.setattr(RunTrackio, "_send", lambda self, metrics, step: sent.update(metrics))
    logger = RunTrackio(folder=tmp_path, project="test")
    logger.resume_from(2)
    logger.log_metrics({"loss": 1.0}, 3)
    assert sent.keys() == unsent


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, (kind, _) in SERVICES.items():
        checkout = rf"\(in a checkout: pip install -e '\.\[{name}\]'\)"
        message = rf"^logger={name} needs the package {name}: pip install {name} {checkout}\.$"
        with pytest.raises(ValueError, match=message):
            kind(tmp_path, "lab")


@pytest.mark.slow
def test_wandb_reports_the_command_that_sends_an_offline_run(tmp_path, caplog, monkeypatch):
    library = pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")

    def away(**_: Any) -> bool:
        raise ConnectionError("no answer")

    folder = tmp_path / "a run"
    with caplog.at_level("INFO"):
        assert RunWandb(tmp_path, "lab")._wandb_init["mode"] == "offline"
        logger = RunWandb(folder, "lab", offline=True)
        assert logger._wandb_init["mode"] == "offline" and "anonymous" not in logger._wandb_init
        monkeypatch.setattr(library, "login", away)
        assert RunWandb(tmp_path, "lab")._wandb_init["mode"] == "offline"
        monkeypatch.setattr(library, "login", lambda **_: True)
        assert "mode" not in RunWandb(tmp_path, "lab", group="g")._wandb_init
        monkeypatch.setenv("WANDB_MODE", "offline")
        RunWandb(tmp_path, "lab")
    assert "works offline (WANDB_MODE=offline)" in caplog.text
    assert "nobody is logged in" in caplog.text and "no answer" in caplog.text
    assert "wandb sync --id " in caplog.text and f"{tmp_path}/wandb/offline-run-*" in caplog.text
    assert "(logger.wandb.offline=true)" in caplog.text
    assert f" '{folder}/wandb'/offline-run-*" in caplog.text

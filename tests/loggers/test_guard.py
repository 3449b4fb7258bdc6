"""The guard works with any of Lightning's loggers; a logger that fails costs one warning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

from mtp_lightning.loggers.base import RunLogger
from mtp_lightning.loggers.guard import GuardedLogger


def noted(method: str) -> Callable[..., str]:
    """A method of a logger that notes its name and the values of its arguments."""

    def call(self: Foreign, *values: Any, **named: Any) -> str:
        self.calls.append((method, (*values, *named.values())))
        if method == self.fails:
            raise ConnectionError("the server is away\nmore of it")
        return method

    return call


class Foreign(Logger):
    """A user's logger: exactly Lightning's interface, and one more method."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[tuple[str, Any]] = []

    version = 3
    name, experiment = property(noted("name")), property(noted("experiment"))
    log_metrics, log_hyperparams = noted("log_metrics"), noted("log_hyperparams")
    finalize, save, watch = noted("finalize"), noted("save"), noted("watch")


def use(logger: GuardedLogger) -> None:
    """Every call of a run."""
    logger.resume_from(1)
    logger.log_hyperparams({"a": 1})
    assert logger.experiment is not None
    logger.log_metrics({"train/loss": 0.5}, 2)
    logger.log_metrics(metrics={"train/loss": 0.5}, step=3)
    logger.write_text("text", "a", 3)
    _ = logger.name, logger.version, logger.save_dir, logger.log_dir
    assert logger.group_separator == "/"
    logger.watch("model")
    logger.save()
    logger.finalize("success")
    logger.log_final({"a": 1}, {"val/loss": 0.5}, 3)
    logger.close()


def test_a_foreign_logger_gets_lightnings_calls_alone() -> None:
    foreign = Foreign()
    use(GuardedLogger(foreign, "mine"))
    assert foreign.calls == [
        ("log_hyperparams", ({"a": 1},)),
        ("experiment", ()),
        ("log_metrics", ({"train/loss": 0.5}, 2)),
        ("log_metrics", ({"train/loss": 0.5}, 3)),
        ("name", ()),
        ("watch", ("model",)),
        ("save", ()),
        ("save", ()),  # at the end of fit; close() ends the run
        ("finalize", ("success",)),
    ]


@pytest.mark.parametrize(
    "method", ["log_hyperparams", "log_metrics", "experiment", "name", "watch", "save", "finalize"]
)
def test_a_failure_is_one_warning_and_the_last_call(method, caplog):
    foreign = Foreign(fails=method)
    use(GuardedLogger(foreign, "mine"))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "\n" not in record.getMessage()
    error = "ConnectionError: the server is away"
    for words in ("logger.mine", method, error, "the run continues"):
        assert words in record.getMessage()
    assert foreign.calls[-1][0] == method and [m for m, _ in foreign.calls].count(method) == 1


def test_ctrl_c_is_raised() -> None:
    class Interrupted(Foreign):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GuardedLogger(Interrupted(), "mine").log_metrics({}, 1)


def test_a_failed_run_finalizes_the_logger_at_once() -> None:
    foreign = Foreign()
    GuardedLogger(foreign, "mine").finalize("failed")
    assert foreign.calls == [("finalize", ("failed",))]


def test_the_guard_has_the_class_and_attributes_of_its_logger(tmp_path: Path) -> None:
    logger = GuardedLogger(CSVLogger(str(tmp_path)), "csv")
    assert isinstance(logger, CSVLogger) and not isinstance(logger, RunLogger)
    assert isinstance(GuardedLogger(Ours(), "mine"), RunLogger)
    assert logger.log_dir == CSVLogger(str(tmp_path)).log_dir
    assert not hasattr(logger, "watch")
    assert copy.copy(logger).version == logger.version


class Ours(RunLogger, Foreign):
    resume_from, write_text, log_final = map(noted, ("resume_from", "write_text", "log_final"))


def test_a_run_logger_also_gets_this_projects_calls() -> None:
    ours = Ours()
    use(GuardedLogger(ours, "ours"))
    names = [name for name, _ in ours.calls]
    assert names[0] == "resume_from" and "write_text" in names
    assert names[-2:] == ["log_final", "finalize"]

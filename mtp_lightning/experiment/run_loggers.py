"""Builds the loggers of a run, resumes them, and closes them at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from mtp_lightning.errors import UserError
from mtp_lightning.experiment.instantiate import instantiate
from mtp_lightning.loggers.csv import MetricsCSV
from mtp_lightning.loggers.guard import GuardedLogger, warn_of_failure
from mtp_lightning.run.layout import METRICS_FILE


def build_loggers(cfg: DictConfig, *, resume_step: int | None) -> list[Any]:
    """Build the loggers of the group ``logger``. ``metrics.csv``, which sweeps, search and reports
    read, is always one of them.

    Args:
        cfg: the config.
        resume_step: the optimizer step that the run continues from; logs after it are dropped.

    Raises:
        UserError: a setting is wrong, or a package is not installed.
    """
    built: dict[str, Any] = {}
    for key, node in (cfg.get("logger") or {}).items():
        try:
            built[str(key)] = instantiate(node, kind=Logger)
        except ValueError:
            raise
        except Exception as error:
            if isinstance(error, ImportError) or isinstance(error.__cause__, ImportError):
                raise UserError(
                    f"logger.{key} needs a package that cannot be imported: {error}"
                ) from error
            # A server that does not answer, for example, must not stop the run.
            warn_of_failure(str(key), "construction", error)
    folder = Path(cfg.paths.output_dir)
    if not any(isinstance(logger, MetricsCSV) for logger in built.values()):
        built = {"csv": MetricsCSV(folder), **built}
    loggers = [GuardedLogger(logger, key) for key, logger in built.items()]
    if resume_step is None and (folder / METRICS_FILE).exists():
        resume_step = 0  # the run was killed before its first checkpoint, and starts again
    if resume_step is not None:
        for logger in loggers:
            logger.resume_from(resume_step)
    return loggers


def end_loggers(trainer: pl.Trainer, params: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Log the final metrics, and close every logger.

    Args:
        trainer: the run's trainer.
        params: the run's hyperparameters.
        summary: the content of ``summary.json``.
    """
    final = {tag: value for tag, value in summary.items() if "/" in tag}
    for logger in trainer.loggers:
        assert isinstance(logger, GuardedLogger)
        logger.log_final(params, final, trainer.global_step)
        logger.close()

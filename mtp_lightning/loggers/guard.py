"""A logger that fails costs one warning, never a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.pytorch.loggers.logger import DummyExperiment, Logger

from mtp_lightning.loggers.base import RunLogger
from mtp_lightning.metrics.long_range.curves import Curves

log = logging.getLogger(__name__)


class GuardedLogger(RunLogger):
    """Wraps any of a run's loggers.

    An exception in the logger is reported once; from then on the logger is left out, since an
    unreachable server would cost a timeout at every step. ``isinstance`` and the logger's own
    attributes, such as ``watch``, refer to the wrapped logger.

    Lightning calls ``finalize("success")`` whenever ``fit`` or ``validate`` ends. A run ends later,
    when its ``summary.json`` is written: then :meth:`close` passes it on.

    Args:
        logger: a logger of Lightning, or a :class:`RunLogger`.
        key: its name in the config's group ``logger``.
    """

    def __init__(self, logger: Logger, key: str) -> None:
        self._logger = logger
        self._key = key
        self._failed = False

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """The wrapped logger's class, which callbacks check for."""
        return type(self._logger)

    def __getattr__(self, name: str) -> Any:
        if name == "_logger":  # while it is being copied
            raise AttributeError(name)
        value = getattr(self._logger, name)
        return partial(self._call, name) if callable(value) else value

    @property
    def name(self) -> Any:
        return self._get("name")

    @property
    def version(self) -> Any:
        return self._get("version")

    @property
    def save_dir(self) -> Any:
        return self._get("save_dir")

    @property
    def root_dir(self) -> Any:
        return self._get("root_dir")

    @property
    def log_dir(self) -> Any:
        return self._get("log_dir")

    @property
    def group_separator(self) -> str:
        return self._logger.group_separator

    @property
    def experiment(self) -> Any:
        """The service's own object; one that does nothing if the logger has none or failed."""
        found = self._get("experiment")
        return DummyExperiment() if found is None else found

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._call("log_metrics", metrics, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._call("log_hyperparams", params, *args, **kwargs)

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        self._call("log_graph", *args, **kwargs)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self._call("after_save_checkpoint", checkpoint_callback)

    def save(self) -> None:
        self._call("save")

    def finalize(self, status: str) -> None:
        """Tells the logger that the run failed; the end of ``fit`` only saves."""
        self._call("save") if status == "success" else self._call("finalize", status)

    def close(self) -> None:
        """Tells the logger that the run has ended well."""
        self._call("finalize", "success")

    def resume_from(self, step: int) -> None:
        if isinstance(self._logger, RunLogger):
            self._call("resume_from", step)

    def write_text(self, tag: str, text: str, step: int) -> None:
        if isinstance(self._logger, RunLogger):
            self._call("write_text", tag, text, step)

    def write_curves(self, tag: str, curves: Curves, step: int) -> None:
        if isinstance(self._logger, RunLogger):
            self._call("write_curves", tag, curves, step)

    def log_final(self, params: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        if isinstance(self._logger, RunLogger):
            self._call("log_final", params, metrics, step)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self._failed:
            return None
        try:
            return getattr(self._logger, method)(*args, **kwargs)
        except Exception as error:
            self._give_up(method, error)

    def _get(self, attribute: str) -> Any:
        if self._failed:
            return None
        try:
            return getattr(self._logger, attribute, None)
        except Exception as error:
            self._give_up(attribute, error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._failed = True
        warn_of_failure(self._key, what, error)


def warn_of_failure(key: str, what: str, error: BaseException) -> None:
    """Logs the one warning about a logger that failed.

    Args:
        key: its name in the config's group ``logger``.
        what: the method or attribute that failed.
        error: the error.
    """
    reason = (str(error).strip().splitlines() or [""])[0]
    log.warning(
        "logger.%s failed (%s: %s: %s) and is left out from here on; the run continues.",
        *(key, what, type(error).__name__, reason),
    )

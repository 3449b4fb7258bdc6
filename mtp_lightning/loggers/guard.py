"""A logger that fails costs one warning, never a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch.loggers.logger import DummyExperiment, Logger

from mtp_lightning.loggers.base import RunLogger

log = logging.getLogger(__name__)


class GuardedLogger:
    """Wraps any of a run's loggers.

    An exception in the logger is reported once; from then on the logger is left out, since an
    unreachable server would cost a timeout at every step. To ``isinstance`` it is the wrapped
    logger, and so are its methods and properties; the hooks of :class:`RunLogger` do nothing for
    another logger.

    Lightning calls ``finalize("success")`` whenever ``fit`` or ``validate`` ends. A run ends later,
    when its ``summary.json`` is written: then :meth:`close` passes it on. ``key`` is the logger's
    name in the config's group ``logger``.
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
        kind = type(self._logger)
        if not hasattr(kind, name):
            if hasattr(RunLogger, name):
                return lambda *args, **kwargs: None
            return getattr(self._logger, name)
        if callable(getattr(kind, name)):
            return partial(self._try, name, getattr(self._logger, name))
        return self._try(name, getattr, self._logger, name)

    @property
    def group_separator(self) -> str:
        """The wrapped logger's separator, which Lightning reads from a failed logger, too."""
        return self._logger.group_separator

    @property
    def experiment(self) -> Any:
        """The service's own object; one that does nothing if the logger has none or failed."""
        service = self._try("experiment", getattr, self._logger, "experiment", None)
        return DummyExperiment() if service is None else service

    def finalize(self, status: str) -> None:
        """Tells the logger that the run failed; the end of ``fit`` only saves."""
        if status == "success":
            self._try("save", self._logger.save)
        else:
            self._try("finalize", self._logger.finalize, status)

    def close(self) -> None:
        """Tells the logger that the run has ended well."""
        self._try("finalize", self._logger.finalize, "success")

    def _try(self, what: str, action: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if not self._failed:
            try:
                return action(*args, **kwargs)
            except Exception as error:
                self._failed = True
                warn_of_failure(self._key, what, error)
        return None


def warn_of_failure(key: str, what: str, error: BaseException) -> None:
    """Logs the one warning about a logger whose method or attribute ``what`` failed; ``key`` is its
    name in the config's group ``logger``."""
    reason = (str(error).strip().splitlines() or [""])[0]
    log.warning(
        "logger.%s failed (%s: %s: %s) and is left out from here on; the run continues.",
        *(key, what, type(error).__name__, reason),
    )

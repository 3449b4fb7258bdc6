"""The base class of this project's loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger


class RunLogger(Logger):
    """Lightning's interface and three more hooks of a run; the defaults do nothing.

    A run calls ``resume_from`` (if it continues), ``log_hyperparams``, then ``log_metrics`` and
    ``write_text``; once ``summary.json`` is written, ``log_final`` and ``finalize``. The comments
    of conf/logger explain each logger's settings.
    """

    def resume_from(self, step: int) -> None:
        """Forgets what was logged after ``step``, the last step that the resumed run does not
        repeat; called before anything is logged."""

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Logs a text with its line ends."""

    def log_final(self, params: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Logs a run's settings, as ``log_hyperparams`` gets them, and its final metrics by tag, at
        its last optimizer step."""

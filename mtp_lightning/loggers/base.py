"""What a logger of this project can do more than any of Lightning's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from mtp_lightning.metrics.long_range.curves import Curves


class RunLogger(Logger):
    """Lightning's interface and four hooks of a run, all of which may be left as they are.

    The order of a run: ``resume_from`` (if it continues), ``log_hyperparams``, ``log_metrics``,
    ``write_text`` and ``write_curves`` while it lasts; once ``summary.json`` is written,
    ``log_final`` and ``finalize``.
    """

    def resume_from(self, step: int) -> None:
        """Forget what was logged after ``step``, the last one that the resumed run does not do
        again; called before anything is logged."""

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Log a text, line ends and all."""

    def write_curves(self, tag: str, curves: Curves, step: int) -> None:
        """Draw a chart."""

    def log_final(self, params: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Log what the run ended with.

        Args:
            params: what it was started with, as in ``log_hyperparams``.
            metrics: the final ones, by log tag.
            step: optimizer steps done.
        """

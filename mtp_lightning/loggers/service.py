"""The base of loggers to a tracking service, whose run continues when the run is resumed."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mtp_lightning.cli import require_package
from mtp_lightning.loggers.base import RunLogger
from mtp_lightning.run.atomic import write_json
from mtp_lightning.run.layout import METRICS_FILE, TRACKERS_FILE
from mtp_lightning.run.metrics import STEP, read_metrics


class ServiceMemory:
    """Lets a resumed run continue as the same run of the service.

    A service keeps everything, and a resumed run repeats steps with the same results, so it must
    not send these again.

    Args:
        folder: the run folder.
        service: name of the service in the folder's ``trackers.json``.
    """

    def __init__(self, folder: str | Path, service: str) -> None:
        self.folder = Path(folder).absolute()
        self._service = service
        self._sent: dict[int, frozenset[str]] = {}

    def recall(self) -> str | None:
        """The service's name of this run; None if the service does not know it."""
        found = self._read().get(self._service)
        return found if isinstance(found, str) else None

    def remember(self, run: str) -> None:
        """Stores the service's name of this run."""
        if self.recall() != run:
            write_json({**self._read(), self._service: run}, self.folder / TRACKERS_FILE)

    def resume_from(self, step: int) -> None:
        """Finds out what was sent after ``step``: the values in ``metrics.csv``, if the service
        knows the run. Called before that file is cut."""
        file = self.folder / METRICS_FILE
        rows = read_metrics(file) if self.recall() and file.is_file() else []
        self._sent = {int(row[STEP]): frozenset(row) for row in rows if row[STEP] > step}

    def news(self, metrics: Mapping[str, float], step: int | None) -> dict[str, float]:
        """The values of a step that the service does not have."""
        sent = self._sent.get(-1 if step is None else step, frozenset())
        return {tag: value for tag, value in metrics.items() if tag not in sent}

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads((self.folder / TRACKERS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


class ServiceLogger(RunLogger):
    """Sends to a service what it does not have yet, and finds the service's run again."""

    def _join(self, folder: str | Path, service: str) -> ServiceMemory:
        """The memory of a run folder.

        Raises:
            UserError: if the service's package is not installed.
        """
        require_package(service, what=f"logger={service}", extra=service)
        self._memory = ServiceMemory(folder, service)
        return self._memory

    def resume_from(self, step: int) -> None:
        """Continues the run as the service has it."""
        self._memory.resume_from(step)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:  # type: ignore[override]
        """Begins the run, or finds it again, and sends its settings."""
        self._memory.folder.mkdir(parents=True, exist_ok=True)
        self._memory.remember(self._begin(params))
        self._send_settings(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Sends the values that the service does not have yet."""
        news = self._memory.news(metrics, step)
        if news:
            self._send(news, step)

    @abstractmethod
    def _begin(self, params: Mapping[str, Any]) -> str:
        """Begins or finds the run; returns the service's name of it."""

    def _send_settings(self, params: Mapping[str, Any]) -> None:
        """Sends the settings, if :meth:`_begin` has not."""

    @abstractmethod
    def _send(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Sends values."""

"""The base of loggers to a tracking service, whose run continues when the run is resumed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mtp_lightning.errors import UserError, require_package
from mtp_lightning.loggers.base import RunLogger
from mtp_lightning.run.atomic import write_json
from mtp_lightning.run.layout import METRICS_FILE, TRACKERS_FILE
from mtp_lightning.run.metrics import STEP, read_metrics
from mtp_lightning.stored import read_json


class ServiceLogger(RunLogger):
    """Lets a resumed run continue as the same run of the service.

    A service keeps everything, and a resumed run repeats steps with the same results, so this sends
    only what the service does not have yet. The folder's ``trackers.json`` has the service's name
    of the run.
    """

    def _join(self, folder: str | Path, service: str) -> str | None:
        """Remember a run folder, and the service's key in its ``trackers.json``; return the
        service's name of the run, None if the folder has none yet.

        Raises:
            UserError: if the service's package is not installed.
        """
        require_package(service, what=f"logger={service}", extra=service)
        self._run_folder = Path(folder).absolute()
        self._service = service
        self._sent: dict[int, frozenset[str]] = {}  # the tags that the service has, by step
        name = self._trackers().get(service)
        return name if isinstance(name, str) else None

    def resume_from(self, step: int) -> None:
        """Finds out what was sent after ``step``, if the service knows the run: what earlier starts
        noted, and the values in ``metrics.csv``. Called before that file is cut."""
        trackers, file = self._trackers(), self._run_folder / METRICS_FILE
        if not isinstance(trackers.get(self._service), str):
            return
        noted = trackers.get(f"{self._service}_sent")
        noted = noted if isinstance(noted, dict) else {}
        sent = {int(done): frozenset(tags) for done, tags in noted.items()}
        for row in read_metrics(file) if file.is_file() else []:
            sent[int(row[STEP])] = sent.get(int(row[STEP]), frozenset()) | frozenset(row)
        self._sent = {done: tags for done, tags in sent.items() if done > step}

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:  # type: ignore[override]
        """Begins the run with its settings, or finds it again."""
        self._run_folder.mkdir(parents=True, exist_ok=True)
        run = self._begin(params)
        # What is cut from metrics.csv now may be all that is known of these steps.
        noted = {str(step): sorted(tags) for step, tags in self._sent.items()}
        trackers = self._trackers() | {self._service: run, f"{self._service}_sent": noted}
        write_json(trackers, self._run_folder / TRACKERS_FILE)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        sent = self._sent.get(-1 if step is None else step, frozenset())
        unsent = {tag: value for tag, value in metrics.items() if tag not in sent}
        if unsent:
            self._send(unsent, step)

    @abstractmethod
    def _begin(self, params: Mapping[str, Any]) -> str:
        """Begins or finds the run; returns the service's name of it."""

    @abstractmethod
    def _send(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Sends values."""

    def _trackers(self) -> dict[str, Any]:
        """The content of ``trackers.json``; empty if it is missing or damaged."""
        try:
            content = read_json(self._run_folder / TRACKERS_FILE)
        except (OSError, UserError):
            return {}
        return content if isinstance(content, dict) else {}

"""Which run of a tracking service belongs to a run folder, and what the service already has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

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

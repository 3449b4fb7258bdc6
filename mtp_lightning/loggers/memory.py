"""Which run of a tracking service a run folder is, and what the service knows of it already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mtp_lightning.run.atomic import write_json
from mtp_lightning.run.layout import METRICS_FILE, TRACKERS_FILE
from mtp_lightning.run.metrics import STEP, read_metrics


class ServiceMemory:
    """Lets a resumed run go on as the same run of the service.

    A service forgets nothing, so a resumed run must not send again what it does again: it does the
    same steps with the same results.

    Args:
        folder: of the run.
        service: its name in the folder's ``trackers.json``.
    """

    def __init__(self, folder: str | Path, service: str) -> None:
        self.folder = Path(folder).absolute()
        self._service = service
        self._sent: dict[int, frozenset[str]] = {}

    def recall(self) -> str | None:
        """What the service calls this run; None for one that it does not know."""
        found = self._read().get(self._service)
        return found if isinstance(found, str) else None

    def remember(self, run: str) -> None:
        """Store what the service calls this run."""
        if self.recall() != run:
            write_json({**self._read(), self._service: run}, self.folder / TRACKERS_FILE)

    def resume_from(self, step: int) -> None:
        """Find out what was sent after ``step``: what stands in ``metrics.csv``, if the service
        knows the run. Called before that file is cut."""
        file = self.folder / METRICS_FILE
        rows = read_metrics(file) if self.recall() and file.is_file() else []
        self._sent = {int(row[STEP]): frozenset(row) for row in rows if row[STEP] > step}

    def news(self, metrics: Mapping[str, float], step: int | None) -> dict[str, float]:
        """What of a step's values the service does not have."""
        sent = self._sent.get(-1 if step is None else step, frozenset())
        return {tag: value for tag, value in metrics.items() if tag not in sent}

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads((self.folder / TRACKERS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

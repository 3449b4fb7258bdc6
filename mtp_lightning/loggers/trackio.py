"""Trackio: a local database, and a dashboard that ``trackio show`` opens."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mtp_lightning.loggers.service import ServiceLogger


class RunTrackio(ServiceLogger):
    """Logs to Trackio, and continues its run when the run is resumed. ``options`` are further ones
    of ``trackio.init``, such as ``group`` or ``space_id``."""

    def __init__(
        self, folder: str | Path, project: str, name: str | None = None, **options: Any
    ) -> None:
        super().__init__()
        run = self._join(folder, "trackio")
        self._project = project
        self._run_name = run or name or f"{self._run_folder.name}-{uuid.uuid4().hex[:4]}"
        self._options = options
        self._params: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self._run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run, begun or found again at first use."""
        if self._run is None:
            import trackio

            self._run = trackio.init(
                project=self._project,
                name=self._run_name,
                config=self._params,
                resume="allow",
                **{"embed": False, **self._options},
            )
        return self._run

    def _begin(self, params: Mapping[str, Any]) -> str:
        self._params = dict(params)
        _ = self.experiment
        return self._run_name

    def _send(self, metrics: Mapping[str, float], step: int | None) -> None:
        self.experiment.log(metrics, step=step)

    @rank_zero_only
    def write_text(self, tag: str, text: str, step: int) -> None:
        """Logs a text that is shown verbatim."""
        import trackio

        self.experiment.log({tag: trackio.Markdown(f"```\n{text}\n```")}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Waits until everything is stored."""
        if self._run is not None:
            import trackio

            trackio.finish()
            self._run = None

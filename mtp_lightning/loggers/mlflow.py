"""MLflow: a server, or a database file next to the run folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mtp_lightning.loggers.service import ServiceLogger
from mtp_lightning.run.lock import Lock


class RunMLflow(ServiceLogger, MLFlowLogger):
    """Lightning's logger for MLflow, which continues its run when the run is resumed.

    Without ``tracking_uri``, the runs of one folder, or the jobs of one sweep, share ``mlflow.db``
    in it: ``mlflow ui --backend-store-uri sqlite:///runs/mlflow.db``. ``options`` are further ones
    of Lightning's logger, such as ``tags``.
    """

    def __init__(
        self,
        folder: str | Path,
        experiment: str,
        tracking_uri: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        run = self._join(folder, "mlflow")
        shared = self._run_folder.parent
        if tracking_uri is None:
            shared.mkdir(parents=True, exist_ok=True)
            tracking_uri = f"sqlite:///{shared / 'mlflow.db'}"
            options.setdefault("artifact_location", (shared / "mlflow_files").as_uri())
        # The jobs of a sweep start together; only one may create the store, or the experiment.
        self._lock = Lock(shared / ".mlflow.lock")
        with self._lock.held(seconds=60):
            MLFlowLogger.__init__(
                self,
                experiment_name=experiment,
                run_name=name or self._run_folder.name,
                tracking_uri=tracking_uri,
                run_id=run,
                **options,
            )

    def _begin(self, params: Mapping[str, Any]) -> str:
        with self._lock.held(seconds=60):
            run = self.run_id  # creates the experiment
        self.experiment.update_run(run, status="RUNNING")  # an interrupted run is marked as failed
        return str(run)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:  # type: ignore[override]
        """Begins the run, or finds it again, and sends its settings."""
        super().log_hyperparams(params)
        stored = self.experiment.get_run(self.run_id).data.params
        # MLflow cannot change a parameter of a run, so settings changed at a resume are not sent.
        MLFlowLogger.log_hyperparams(self, {k: v for k, v in params.items() if k not in stored})

    def _send(self, metrics: Mapping[str, float], step: int | None) -> None:
        MLFlowLogger.log_metrics(self, metrics, step)

    @rank_zero_only
    def write_text(self, tag: str, text: str, step: int) -> None:
        self.experiment.log_text(self.run_id, text, f"{tag}_{step}.txt")

    @rank_zero_only
    def log_final(self, params: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        self._send(metrics, step)

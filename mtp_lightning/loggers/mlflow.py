"""MLflow: a server, or a database file next to the run folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mtp_lightning.cli import require_package
from mtp_lightning.loggers.base import RunLogger
from mtp_lightning.loggers.memory import ServiceMemory
from mtp_lightning.run.lock import Lock


class RunMLflow(RunLogger, MLFlowLogger):
    """Lightning's logger for MLflow, which continues its run when the run is resumed.

    Args:
        folder: the run folder.
        experiment: the experiment that the run belongs to.
        tracking_uri: URI of the store; None is ``mlflow.db`` next to the run folder, which the runs
            of one folder, or the jobs of one sweep, share: ``mlflow ui --backend-store-uri
            sqlite:///runs/mlflow.db``.
        name: name of the run there; None takes the folder's.
        options: further options of Lightning's logger, such as ``tags``.

    Raises:
        UserError: if the package is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        experiment: str,
        tracking_uri: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        require_package("mlflow", what="logger=mlflow", extra="mlflow")
        self._memory = ServiceMemory(folder, "mlflow")
        shared = self._memory.folder.parent
        if tracking_uri is None:
            shared.mkdir(parents=True, exist_ok=True)
            tracking_uri = f"sqlite:///{shared / 'mlflow.db'}"
            options.setdefault("artifact_location", (shared / "mlflow_files").as_uri())
        # The jobs of a sweep start together, and only one of them may create the store.
        with Lock(shared / ".mlflow.lock").held(seconds=60):
            MLFlowLogger.__init__(
                self,
                experiment_name=experiment,
                run_name=name or self._memory.folder.name,
                tracking_uri=tracking_uri,
                run_id=self._memory.recall(),
                **options,
            )

    def resume_from(self, step: int) -> None:
        """Continues the run as it is in the store."""
        self._memory.resume_from(step)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:  # type: ignore[override]
        """Begins the run, or finds it again, and stores its settings."""
        with Lock(self._memory.folder.parent / ".mlflow.lock").held(seconds=60):
            run = self.run_id  # creates the experiment
        self.experiment.update_run(run, status="RUNNING")  # an interrupted run is marked as failed
        self._memory.folder.mkdir(parents=True, exist_ok=True)
        self._memory.remember(str(run))
        known = self.experiment.get_run(run).data.params
        # MLflow cannot change a parameter of a run, so settings changed at a resume are not sent.
        super().log_hyperparams({key: value for key, value in params.items() if key not in known})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Stores the values that the service does not have yet."""
        news = self._memory.news(metrics, step)
        if news:
            super().log_metrics(news, step)

    @rank_zero_only
    def write_text(self, tag: str, text: str, step: int) -> None:
        """Stores a text as a file of the run."""
        self.experiment.log_text(self.run_id, text, f"{tag}_{step}.txt")

    @rank_zero_only
    def log_final(self, params: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Stores the final metrics as the newest ones."""
        super().log_metrics(metrics, step)

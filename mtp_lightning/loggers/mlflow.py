"""MLflow: a server, or a database file beside the run folders."""

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
    """Lightning's logger for MLflow, which goes on with its run when the run does.

    Args:
        folder: the run folder.
        experiment: that the run belongs to.
        tracking_uri: of the store; None is ``mlflow.db`` beside the run folder, which the runs of
            one place, or the jobs of one sweep, share: ``mlflow ui --backend-store-uri
            sqlite:///runs/mlflow.db``.
        name: of the run there; None takes the folder's.
        options: further ones of Lightning's logger, such as ``tags``.

    Raises:
        UserError: the package is not installed.
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
        # The jobs of a sweep begin together, and only one of them may create the store.
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
        """Go on with the run as it is in the store."""
        self._memory.resume_from(step)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:  # type: ignore[override]
        """Begin the run, or find it again, and store its settings."""
        with Lock(self._memory.folder.parent / ".mlflow.lock").held(seconds=60):
            run = self.run_id  # creates the experiment
        self.experiment.update_run(run, status="RUNNING")  # an interrupted one had failed
        self._memory.folder.mkdir(parents=True, exist_ok=True)
        self._memory.remember(str(run))
        known = self.experiment.get_run(run).data.params
        # A parameter of a run cannot be changed: what was changed at a resume stays what it was.
        super().log_hyperparams({key: value for key, value in params.items() if key not in known})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Store what the service does not have yet."""
        news = self._memory.news(metrics, step)
        if news:
            super().log_metrics(news, step)

    @rank_zero_only
    def write_text(self, tag: str, text: str, step: int) -> None:
        """Store a text as a file of the run."""
        self.experiment.log_text(self.run_id, text, f"{tag}_{step}.txt")

    @rank_zero_only
    def log_final(self, params: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Store the final metrics as the newest ones."""
        super().log_metrics(metrics, step)

"""Weights & Biases; offline if its server cannot be reached."""

from __future__ import annotations

import html
import logging
import os
import shlex
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mtp_lightning.loggers.service import ServiceLogger

log = logging.getLogger(__name__)


class RunWandb(ServiceLogger, WandbLogger):
    """Lightning's logger for Weights & Biases, which continues its run when the run is resumed.

    The service's own files go to ``wandb/`` in the run folder. With ``offline=None``, everything
    stays there if nobody is logged in or the server cannot be reached. ``options`` are further ones
    of Lightning's logger or ``wandb.init``, such as ``group``.
    """

    def __init__(
        self,
        folder: str | Path,
        project: str,
        name: str | None = None,
        offline: bool | None = None,
        **options: Any,
    ) -> None:
        run = self._join(folder, "wandb") or uuid.uuid4().hex[:8]
        reason = "logger.wandb.offline=true" if offline else ""
        if offline is None:
            reason = _why_offline()
        if reason:
            options["mode"] = "offline"
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                # All of them: a run that was resumed has several, each with a part of its steps.
                files = f"{shlex.quote(str(self._run_folder / 'wandb'))}/offline-run-*"
                command = f"wandb sync --id {run} {files}"
                log.info("wandb works offline (%s); to send it later: %s", reason, command)
        WandbLogger.__init__(
            self,
            name=name or self._run_folder.name,
            project=project,
            save_dir=self._run_folder,
            id=run,
            **options,
        )
        self._wandb_init.pop("anonymous", None)  # wandb warns that it ignores it

    def _begin(self, params: Mapping[str, Any]) -> str:
        WandbLogger.log_hyperparams(self, dict(params))
        return str(self.experiment.id)

    def _send(self, metrics: Mapping[str, float], step: int | None) -> None:
        WandbLogger.log_metrics(self, metrics, step)

    @rank_zero_only
    def write_text(self, tag: str, text: str, step: int) -> None:
        """Sends a text that is shown verbatim."""
        import wandb

        shown = wandb.Html(f"<pre>{html.escape(text)}</pre>")
        self.experiment.log({tag: shown, "trainer/global_step": step})

    @rank_zero_only
    def log_final(self, params: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        self.experiment.summary.update(dict(metrics))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def _why_offline() -> str:
    """Why the server cannot be used; empty if it can. It is not checked if WANDB_MODE is set, nor
    by processes that do not log."""
    mode = os.environ.get("WANDB_MODE")
    if mode or rank_zero_only.rank > 0:  # type: ignore[attr-defined]
        return "WANDB_MODE=offline" if mode == "offline" else ""
    import wandb

    try:
        return "" if wandb.login(prompt=False) else "nobody is logged in"
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0]

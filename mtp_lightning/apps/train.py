"""Trains a model: ``mtp-lightning train``; ``--help`` explains it."""

from __future__ import annotations

import os
import sys

from omegaconf import DictConfig

from mtp_lightning.apps import imports, start
from mtp_lightning.command_line.shell import readable_errors
from mtp_lightning.errors import UserError
from mtp_lightning.system import end_with_starter

_RUN_DIR = "run_dir"


def task(cfg: DictConfig) -> float:
    """Hydra calls this with the composed config."""
    # Imported here, so that --help does not wait for torch.
    with imports():
        from mtp_lightning import processes
        from mtp_lightning.experiment.training import train

    peers = processes.find(cfg.trainer)
    if peers.rank == 0:  # the others have received it before composing their config
        peers.broadcast(_RUN_DIR, lambda: cfg.run_dir)
    return train(cfg)["val/loss_depth_0"]


def main() -> None:
    """The command line."""
    with readable_errors():
        if not end_with_starter():  # before the imports, which take seconds
            raise UserError("The process that started this one has ended.")
        _take_run_dir()
    start("config", task, trains=True)


def _take_run_dir() -> None:
    """Give the first process's run folder to the others of a run. Its name may contain the time, so
    each process would compose another one."""
    ranks = {os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID", "NODE_RANK")}
    if ranks == {"0"} or {"-m", "--multirun"} & set(sys.argv):
        return
    from mtp_lightning import processes

    peers = processes.find()
    if peers.rank:
        run_dir = peers.broadcast(_RUN_DIR, lambda: None)
        sys.argv += [f"run_dir={run_dir}"]


if __name__ == "__main__":
    main()

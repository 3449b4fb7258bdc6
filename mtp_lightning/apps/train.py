"""Train a model: ``mtp-lightning train``; ``--help`` explains it."""

from __future__ import annotations

import os
import sys

from omegaconf import DictConfig

from mtp_lightning.apps import readable_errors, start
from mtp_lightning.errors import UserError
from mtp_lightning.system import end_with_starter

_RUN_DIR = "run_dir"


def task(cfg: DictConfig) -> float:
    """What Hydra calls with the composed config."""
    with readable_errors():
        # Imported here, so that --help does not wait for torch.
        from mtp_lightning import processes
        from mtp_lightning.experiment.training import train

        peers = processes.find(cfg.trainer)
        if peers.rank == 0:  # the others have asked for it before they composed their config
            peers.told(_RUN_DIR, lambda: cfg.run_dir)
        return train(cfg)["val/loss_depth_0"]


def main() -> None:
    """The command."""
    with readable_errors():
        if not end_with_starter():  # before the seconds that imports take
            raise UserError("the process that has started this one is gone.")
        _take_run_dir()
    start("config", task, has_verbose=True)


def _take_run_dir() -> None:
    """Of processes that are started together, all but the first take its run folder, whose name
    may be made of the time."""
    ranks = [os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID", "NODE_RANK")]
    if set(ranks) == {"0"} or "-m" in sys.argv or "--multirun" in sys.argv:
        return
    from mtp_lightning import processes

    peers = processes.find()
    if peers.rank:
        run_dir = peers.told(_RUN_DIR, lambda: None)
        sys.argv += [f"run_dir={run_dir}"]


if __name__ == "__main__":
    main()

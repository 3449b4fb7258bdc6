"""Train a model: ``mtp-lightning train``; ``--help`` explains it."""

from __future__ import annotations

from omegaconf import DictConfig

from mtp_lightning.apps import readable_errors, start


def task(cfg: DictConfig) -> float:
    """What Hydra calls with the composed config."""
    with readable_errors():
        # Imported here, so that --help does not wait for torch.
        from mtp_lightning.experiment.training import train

        return train(cfg)["val/loss_depth_0"]


def main() -> None:
    """The command."""
    start("config", task)


if __name__ == "__main__":
    main()

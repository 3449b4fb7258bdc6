"""Evaluates a trained model: ``mtp-lightning evaluate``; ``--help`` explains it."""

from __future__ import annotations

from omegaconf import DictConfig

from mtp_lightning.apps import start


def task(cfg: DictConfig) -> None:
    """Hydra calls this with the composed config."""
    # Imported here, so that --help does not wait for torch.
    from mtp_lightning.experiment.evaluating import evaluate

    evaluate(cfg)


def main() -> None:
    """The command line."""
    start("evaluate", task)


if __name__ == "__main__":
    main()

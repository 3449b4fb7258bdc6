"""Continues text: ``mtp-lightning generate``; ``--help`` explains it."""

from __future__ import annotations

from omegaconf import DictConfig

from mtp_lightning.apps import start


def task(cfg: DictConfig) -> None:
    """Hydra calls this with the composed config."""
    # Imported here, so that --help does not wait for torch.
    from mtp_lightning.experiment.generating import generate_text

    generate_text(cfg)


def main() -> None:
    """The command line."""
    start("generate", task, ends_with_reader=True)


if __name__ == "__main__":
    main()

"""Answers requests: ``mtp-lightning serve``; ``--help`` explains it."""

from __future__ import annotations

from omegaconf import DictConfig

from mtp_lightning import parts
from mtp_lightning.apps import start
from mtp_lightning.cli import program


def task(cfg: DictConfig) -> None:
    """Hydra calls this with the composed config."""
    # Imported here, so that --help does not wait for torch.
    parts.need("serving", program("serve")).serve(cfg)


def main() -> None:
    """The command line."""
    start("serve", task)


if __name__ == "__main__":
    main()

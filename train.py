"""Train a model: `python train.py [overrides]`; `--help` explains the rest."""

from mtp_lightning.apps.train import main

if __name__ == "__main__":
    main()

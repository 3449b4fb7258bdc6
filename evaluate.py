"""Evaluate a trained model: `python evaluate.py checkpoint=RUN`; `--help` explains the rest."""

from mtp_lightning.apps.evaluate import main

if __name__ == "__main__":
    main()

"""Evaluates a trained model: ``mtp-lightning evaluate``; ``--help`` explains it."""

from mtp_lightning.apps import app

main = app("evaluate", "mtp_lightning.experiment.evaluating.evaluate")

if __name__ == "__main__":
    main()

"""Continues text: ``mtp-lightning generate``; ``--help`` explains it."""

from mtp_lightning.apps import app

main = app("generate", "mtp_lightning.experiment.generating.generate_text", ends_with_reader=True)

if __name__ == "__main__":
    main()

"""Exports a model: ``mtp-lightning export``; ``--help`` explains it."""

from mtp_lightning.apps import app

main = app("export", "mtp_lightning.interop.export", part="interop")

if __name__ == "__main__":
    main()

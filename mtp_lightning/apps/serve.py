"""Answers requests: ``mtp-lightning serve``; ``--help`` explains it."""

from mtp_lightning.apps import app

main = app("serve", "mtp_lightning.serving.serve", part="serving")

if __name__ == "__main__":
    main()

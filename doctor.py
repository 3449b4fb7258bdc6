"""Examine the MTP layers of a checkpoint: `python doctor.py FOLDER`; `--help` explains the rest."""

from mtp_lightning.apps.doctor import main

if __name__ == "__main__":
    main()

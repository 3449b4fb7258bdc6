"""Export a model: `python export.py checkpoint=RUN output=DIR`; `--help` explains the rest."""

from mtp_lightning.apps.export import main

if __name__ == "__main__":
    main()

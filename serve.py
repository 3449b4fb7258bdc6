"""Answer requests: `python serve.py checkpoint=RUN port=8000`; `--help` explains the rest."""

from mtp_lightning.apps.serve import main

if __name__ == "__main__":
    main()

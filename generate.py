"""Continue text: `python generate.py checkpoint=RUN prompt=TEXT`; `--help` explains the rest."""

from mtp_lightning.apps.generate import main

if __name__ == "__main__":
    main()

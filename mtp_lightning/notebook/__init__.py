"""The platform from a notebook or script: three lines to a run, its numbers and its text.

    from mtp_lightning import train

    run = train("mtp.depth=2", "run_dir=runs/mine")
    run.plot()

Overrides are those of the command line, and so are the results: every call starts the same program
in a process of its own. Only text is generated in this process.
"""

from mtp_lightning.notebook.runs import Run, Sweep, evaluate, generate, sweep, train
from mtp_lightning.notebook.text import Text

__all__ = ["Run", "Sweep", "Text", "evaluate", "generate", "sweep", "train"]

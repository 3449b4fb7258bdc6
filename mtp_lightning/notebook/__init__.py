"""The platform from a notebook or a script of yours: three lines to a run, its numbers, its text.

    from mtp_lightning import train

    run = train("mtp.depth=2", "run_dir=runs/mine")
    run.plot()

Overrides are the command line's own, as one types them there, and so are the results: every call
starts the program that the command line starts, in a process of its own. Only text is generated in
this one.
"""

from mtp_lightning.notebook.calls import evaluate, generate, sweep, train
from mtp_lightning.notebook.jobs import Sweep
from mtp_lightning.notebook.run import Run
from mtp_lightning.notebook.text import Text

__all__ = ["Run", "Sweep", "Text", "evaluate", "generate", "sweep", "train"]

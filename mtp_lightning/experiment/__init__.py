"""The one place that turns a config into objects, and runs them.

The way through a run: config -> data -> model -> module -> trainer -> summary.
"""

from mtp_lightning.experiment.evaluating import evaluate
from mtp_lightning.experiment.training import train

__all__ = ["evaluate", "train"]

"""The names of the files of runs and sweeps."""

from __future__ import annotations

# In a sweep's folder.
SWEEP_FILE = "sweep.json"
# In the folder of a sweep's run, written by the sweep.
STATUS_FILE = "status.json"
LOG_FILE = "job.log"
# In the folder of every run, written by the run.
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
SUMMARY_FILE = "summary.json"
TRACKERS_FILE = "trackers.json"  # this run's identifiers at tracking services
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"
BEST = "best.ckpt"
# The folder of a sharded checkpoint's tensors, and the key of its index.
SHARDS = "parts"


def kept_at(step: int | str) -> str:
    """The file name of the checkpoint that is kept of an optimizer step, or of ``*``: a pattern."""
    return f"step_{step}.ckpt"

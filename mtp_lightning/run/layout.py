"""What the files of a run and of a sweep are called."""

from __future__ import annotations

# Of a sweep.
SWEEP_FILE = "sweep.json"
# Of a sweep's run; written by the sweep.
STATUS_FILE = "status.json"
LOG_FILE = "job.log"
# Of every run; written by itself.
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
SUMMARY_FILE = "summary.json"
TRACKERS_FILE = "trackers.json"  # which run of a tracking service this one is
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"
BEST = "best.ckpt"
SHARDS = "parts"  # in a checkpoint that several processes wrote: where its tensors are


def kept_at(step: int) -> str:
    """The name of the checkpoint of an optimizer step that is to stay."""
    return f"step_{step}.ckpt"

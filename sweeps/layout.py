"""What the files of a sweep and of its runs are called, and a config's dotted keys."""

from __future__ import annotations

from typing import Any

SWEEP_FILE = "sweep.json"
# Of every run; the first two are the sweep's, the others the run's own.
STATUS_FILE = "status.json"
LOG_FILE = "job.log"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
SUMMARY_FILE = "summary.json"


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat

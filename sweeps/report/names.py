"""Names of config keys and values in figures and titles.

Tables and ``--reference`` use the keys as typed.
"""

from __future__ import annotations

from typing import Any

# Key -> (name of its axis, format of its values).
_NAMES = {
    "mtp": ("kind of head", "{}"),
    "mtp.depth": ("D", "D = {}"),
    "mtp_lambda": ("lambda", "lambda = {}"),
    "lambda_schedule": ("lambda schedule", "{} schedule"),
    "balance": ("balancing rule", "{} balancing"),
    "objective": ("objective", "{} objective"),
    "model": ("model size", "{} model"),
    "data.seq_len": ("window length", "windows of {} tokens"),
    "data.batch_size": ("windows per batch", "{} windows per batch"),
    "trainer.max_steps": ("optimizer steps", "{} steps"),
    "optimizer.lr": ("learning rate", "learning rate {}"),
    "tokenizer": ("tokenizer", "{} tokenizer"),
    "folder": ("sweep", "{}"),
}
_HEADS = {
    "none": "no MTP",
    "linear": "linear heads",
    "parallel": "parallel heads",
    "sequential": "sequential modules",
}


def name_of(key: str, value: str) -> str:
    """A readable name of a value: ``D = 2`` for ``mtp.depth=2``; unknown keys stay as typed."""
    if key == "mtp":
        return _HEADS.get(value, f"{value} head")
    return _NAMES[key][1].format(value) if key in _NAMES else f"{key}={value}"


def axis_of(key: str) -> str:
    """A readable name of a key: ``D`` for ``mtp.depth``."""
    return _NAMES[key][0] if key in _NAMES else key


def joined(names: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def question(varied: list[str], metric: Any, *, task: bool) -> str:
    """The question that a report answers; empty if nothing varies.

    Args:
        varied: the keys in which the settings differ.
        metric: the metric by which they are compared.
        task: whether they are compared by the seeds that solve a task.
    """
    if not varied:
        return ""
    which = f"Which {joined([axis_of(key) for key in varied])}"
    one = len(varied) == 1
    if task:
        return f"{which} {'solves' if one else 'solve'} the task?"
    return f"{which} {'gives' if one else 'give'} the lowest loss in {metric.unit}?"

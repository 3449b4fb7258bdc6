"""A config by the dotted keys that people type, and which of them change no number of a run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

# Where a run's files lie, and how a sweep is run.
PLACES = ("run_dir", "sweep_dir", "sweep", "hydra", "paths")
# These, and who only watches a run.
WITHOUT_BEARING = (
    *PLACES,
    "data.cache_dir",
    "data.build_workers",
    "logger",
    "callbacks.nan_guard",
    "callbacks.throughput",
    "callbacks.progress",
    "callbacks.checkpoints",
)


def key_of(override: str) -> str:
    """``+mtp.depth=2`` -> ``mtp.depth``."""
    return override.split("=", 1)[0].lstrip("+~")


def lies_in(key: str, groups: Collection[str]) -> bool:
    """Whether a dotted key is one of some keys or below one of them."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def has_bearing(key: str) -> bool:
    """Whether a dotted key says something about what a run computes."""
    return not lies_in(key, WITHOUT_BEARING)


def is_plain(depth: Any, target: Any) -> bool:
    """Whether this is next-token training, however it was asked for: a stack without depths is
    ``mtp=none``, but for ``mtp=teacherless``, which has none and reads something else.

    Args:
        depth: ``mtp.depth``.
        target: ``mtp._target_``.
    """
    return bool(depth == 0 and not str(target).endswith(".TeacherlessConfig"))


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def describe_differences(
    stored: dict[str, Any], wanted: dict[str, Any], *, ignore: Collection[str] = ()
) -> list[str]:
    """The keys in which two nested configs differ: ``trunk.n_layers: 4 -> 6``.

    Args:
        stored: one config.
        wanted: the other.
        ignore: dotted keys that may differ, with all below them.
    """
    a, b = flatten(stored), flatten(wanted)
    return [
        f"{key}: {a.get(key, 'nothing')} -> {b.get(key, 'nothing')}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not lies_in(key, ignore)
    ]

"""A stored config by dotted keys, as people type them, and the keys that change no result."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

from mtp_lightning.errors import UserError

# The safe loader reads plain data only. With libyaml, a sweep of hundreds of runs takes seconds to
# read instead of minutes.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Keys of the folders of runs, and of how a sweep runs its jobs.
PLACES = ("run_dir", "sweep_dir", "sweep", "hydra", "paths")
# Keys that change no result: these, and those of caches, loggers and watching callbacks.
NOT_TRAINING = (
    *PLACES,
    "stack",  # values of presets for mtp; the stored config also has them as mtp.*
    "data.cache_dir",
    "data.build_workers",
    "logger",
    "callbacks.nan_guard",
    "callbacks.throughput",
    "callbacks.progress",
    "callbacks.checkpoints",
)

# Keys added after runs and results were stored, with the value that changes nothing.
LATER = {
    "branch_from": None,
    "data.train_windows": "all",
    "data.activations": "fp32",
    "objective.terms.anchor.padded": False,
}


def read_yaml(path: Path) -> Any:
    """Read a stored YAML file.

    Raises:
        UserError: the file is not YAML, or has an alias. No run writes aliases, and a few lines of
            nested aliases can expand to more than fits into memory.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        events = yaml.parse(text, _LOADER) if "&" in text and "*" in text else ()
        alias = next((event for event in events if isinstance(event, yaml.AliasEvent)), None)
        if alias is None:
            return yaml.load(text, _LOADER)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {str(error).partition(chr(10))[0]}.") from error
    raise UserError(f"{path} has the alias *{alias.anchor}, which no run writes.")


def key_of(override: str) -> str:
    """``+mtp.depth=2`` -> ``mtp.depth``."""
    return override.split("=", 1)[0].lstrip("+~")


def values_by_key(overrides: Iterable[str]) -> dict[str, str]:
    """The typed values of overrides, by key; of several for one key, the last."""
    return {key_of(override): override.partition("=")[2] for override in overrides}


def lies_in(key: str, groups: Collection[str]) -> bool:
    """Whether a dotted key equals one of ``groups`` or lies below one."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def affects_training(key: str) -> bool:
    """Whether a dotted key can change a run's results."""
    return not lies_in(key, NOT_TRAINING)


def is_plain(depth: Any, target: Any) -> bool:
    """Whether a run with this ``mtp.depth`` and ``mtp._target_`` is plain next-token training.
    Every stack without depths is, except ``mtp=teacherless``, whose trunk reads other tokens."""
    return bool(depth == 0 and not str(target).endswith(".TeacherlessConfig"))


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested config: ``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def describe_differences(
    stored: dict[str, Any], wanted: dict[str, Any], *, ignore: Collection[str] = ()
) -> list[str]:
    """List the keys in which two nested configs differ, as ``trunk.n_layers: 4 -> 6``. A key of
    :data:`LATER` that is missing has its value there; the dotted keys ``ignore``, with all keys
    below them, may differ."""
    a, b = (LATER | flatten(config) for config in (stored, wanted))
    return [
        f"{key}: {a.get(key, 'nothing')} -> {b.get(key, 'nothing')}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not lies_in(key, ignore)
    ]

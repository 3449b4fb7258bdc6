"""A stored config by the dotted keys that people type, and which of them change no number."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from mtp_lightning.errors import UserError

# Plain data only; libyaml reads a sweep of hundreds of runs in seconds instead of minutes.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Where a run's files lie, and how a sweep is run.
PLACES = ("run_dir", "sweep_dir", "sweep", "hydra", "paths")
# These, and who only watches a run.
WITHOUT_BEARING = (
    *PLACES,
    "stack",  # what a preset asks of mtp, which says it
    "data.cache_dir",
    "data.build_workers",
    "logger",
    "callbacks.nan_guard",
    "callbacks.throughput",
    "callbacks.progress",
    "callbacks.checkpoints",
)


def read_yaml(path: Path) -> Any:
    """What a stored file of YAML holds.

    Raises:
        UserError: it is no YAML, or has an alias, which no run writes: a few lines of aliases of
            aliases stand for more than memory holds.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if "&" in text and "*" in text:
            for event in yaml.parse(text, _LOADER):
                if isinstance(event, yaml.AliasEvent):
                    raise UserError(f"{path} has the alias *{event.anchor}, which no run writes.")
        return yaml.load(text, _LOADER)
    except UserError:
        raise
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is no YAML: {str(error).partition(chr(10))[0]}.") from error


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

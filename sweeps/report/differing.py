"""Compares the composed configs of runs, key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.run.config import PLACES, lies_in
from sweeps.report.read import Run, read_sweep
from sweeps.report.settings import show


def configs(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Every run's values of the keys in which any two runs differ, by run; paths are left out.

    Args:
        runs: runs without a config are left out.
    """
    known = {run.name: _shown(run.config) for run in runs if run.config}
    keys = {key for config in known.values() for key in config}
    varied = sorted(k for k in keys if len({config.get(k) for config in known.values()}) > 1)
    return {
        name: {key: config[key] for key in varied if key in config}
        for name, config in known.items()
    }


def describe(first: str | Path, second: str | Path) -> list[str]:
    """One line per key in which two runs differ: ``KEY: A | B``.

    Args:
        first: a run's folder.
        second: another run's folder.

    Raises:
        UserError: a folder is not that of one run with a config.
    """
    left, right = (_shown(_only(folder).config) for folder in (first, second))
    keys = sorted(k for k in left.keys() | right.keys() if left.get(k) != right.get(k))
    return [f"{key}: {left.get(key, '–')} | {right.get(key, '–')}" for key in keys]


def _only(folder: str | Path) -> Run:
    runs = read_sweep(folder).runs
    if len(runs) != 1 or not runs[0].config:
        raise UserError(
            f"{folder} is not a run with a config.yaml: --diff compares the folders of two runs."
        )
    return runs[0]


def _shown(config: Mapping[str, Any]) -> dict[str, str]:
    return {k: show(v) for k, v in config.items() if not lies_in(k, (*PLACES, "stack"))}

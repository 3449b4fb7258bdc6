"""Files and folders that a config names, looked at before torch is imported: are they there, and
what they have to be?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from glob import has_magic
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.literal import INPUTS, LISTS

# Names on a hub, or keys whose class says more.
_NOT_ONLY_PATHS = {"data.field", "data.source.field", "data.source.path", "tokenizer.eot_token"}
_READ = sorted(INPUTS - _NOT_ONLY_PATHS)


def check(config: Mapping[str, Any], app: str, folder: str) -> None:
    """Refuse paths that cannot be what they are said to be.

    Args:
        config: as plain containers.
        app: the file of conf/ that it begins with.
        folder: of a run.

    Raises:
        UserError: a file or folder that is not there, is the other of the two, or is in the way.
    """
    for key in _READ:
        given = _value(config, key)
        for path in given if isinstance(given, list) and key in LISTS else [given]:
            if isinstance(path, str) and path != "???" and "${" not in path:
                _require_there(key, path)
    if app == "config":
        _require_folder("run_dir", Path(folder))
        return
    output = _value(config, "output")
    if app == "evaluate" and output is not None and Path(output).is_dir():
        raise UserError(f"output={output} is a folder: give a file for the metrics.")
    if app == "export" and output not in (None, "???"):
        _require_folder("output", Path(output))
        if Path(output).is_dir() and any(Path(output).iterdir()):
            raise UserError(f"output={output} is not empty: choose another folder or clear it.")


def _require_there(key: str, given: str) -> None:
    path = Path(given).expanduser()
    if key == "branch_from" and "@" in given:  # RUN@STEP
        path = Path(given.rpartition("@")[0]).expanduser()
    if path.exists():
        if key == "prompts":
            require_prompts(path)
        if key == "compare.reference" and not path.is_dir():
            raise UserError(f"{key}={given} is a file: give the folder of a finished run.")
        return
    named = key != "tokenizer.path" or path.suffix == ".json" or given[:1] in "./~"
    if named and not has_magic(given):
        raise UserError(f"{key}={given} does not exist (looked from {Path.cwd()}): check the path.")


def require_prompts(path: Path) -> str:
    """The text of a file of prompts.

    Raises:
        UserError: it is a folder, or not UTF-8.
        OSError: it cannot be read.
    """
    if path.is_dir():
        raise UserError(f"prompts={path} is a folder: give a file of prompts, one a line.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"prompts={path} is not UTF-8: {error}; convert it.") from error


def _require_folder(key: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written into."""
    there = next((p for p in (folder, *folder.absolute().parents) if os.path.lexists(p)), folder)
    if not there.is_dir():
        what = "a file" if there.is_file() else "no folder"
        raise UserError(f"{key}={folder} cannot be a folder, for {there} is {what}: take another.")
    if not os.access(there, os.W_OK | os.X_OK) or os.statvfs(there).f_flag & os.ST_RDONLY:
        raise UserError(f"{key}={folder} cannot be made: {there} is read-only; take another.")


def _value(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node

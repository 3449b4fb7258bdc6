"""In which commit a prediction was, by Git."""

from __future__ import annotations

import subprocess
from pathlib import Path

from mtp_lightning.errors import UserError


def commit_of(file: Path) -> str | None:
    """The commit that brought a file to what it is; None outside of a repository.

    Raises:
        UserError: there are changes that no commit has.
    """
    if _git(file, "rev-parse", "--is-inside-work-tree") != "true":
        return None
    if _git(file, "status", "--porcelain", "--", file.name) != "":
        raise UserError(
            f"{file} is in no commit as it stands: commit the prediction before its runs."
        )
    return _git(file, "log", "-1", "--format=%H", "--", file.name) or None


def _git(file: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(file.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

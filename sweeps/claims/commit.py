"""In which commit a prediction was, by Git."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from sweeps.claims.claim import Claim

TRIAL = "or try it with --unpredicted, which its verdict will say"


def predicted_in(
    file: Path, claim: Claim, stored: Mapping[str, Any] | None, *, unpredicted: bool = False
) -> str | None:
    """The commit that a claim's prediction was in before its runs.

    Args:
        file: the claim's.
        claim: what it says.
        stored: the claim's result, which knows the commit where it is of the same prediction.
        unpredicted: give None for a prediction that is in no commit, instead of refusing it.

    Raises:
        UserError: it is in none.
    """
    if stored is not None and stored["digest"] == claim.digest and stored["predicted_in"]:
        return str(stored["predicted_in"])
    try:
        return commit_of(file)
    except UserError:
        if unpredicted:
            return None
        raise


def commit_of(file: Path) -> str:
    """The commit that brought a file to what it is.

    Raises:
        UserError: the file is in no Git repository, or no commit has it as it stands.
    """
    # Of a link, Git would commit the link and not what it leads to.
    real = file.resolve()
    if _git(real, "rev-parse", "--is-inside-work-tree") != "true":
        raise UserError(
            f"{file} is in no Git repository, so that nobody could tell whether the prediction was "
            f"there before its runs: commit it (git init, git add, git commit), {TRIAL}."
        )
    # Git says nothing of the state of an ignored file, and has no commit of it.
    unchanged = _git(real, "status", "--porcelain", "--", real.name) == ""
    commit = _git(real, "log", "-1", "--format=%H", "--", real.name) if unchanged else None
    if not commit:
        raise UserError(
            f"{file} is in no commit as it stands: commit the prediction before its runs, {TRIAL}."
        )
    return commit


def _git(file: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(file.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""Records every started run of a claim, and the commit with its prediction.

The preregistration is ``LABEL.claim.json`` in the folder of runs. It keeps every seed that was ever
started, so none can be dropped, and the claim's digest, so a later change is noticed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.run.atomic import write_json
from mtp_lightning.run.status import now
from sweeps.claims.claim import Claim, Stored, is_stale
from sweeps.claims.jobs import ClaimJob
from sweeps.plan import read_versioned

VERSION = 1
TRIAL = "or run it with --unpredicted: its verdict is then marked"


@dataclass(kw_only=True)
class Preregistration:
    """The runs of a claim."""

    digest: str  # the claim's, when its first run was requested
    commit: str | None  # the commit with the prediction at that time; None for a trial
    began: str = field(default_factory=now)
    runs: dict[str, dict[int, str]] = field(default_factory=dict)  # folders, by arm and seed

    def is_of(self, claim: Claim) -> bool:
        return self.digest == claim.digest

    def beginning(self, claim: Claim, stored: Stored | None) -> tuple[str, str | None]:
        """The time at which the first run was requested, here or by the stored result of another
        machine, and the prediction's commit at that time."""
        began = [(self.began, self.commit)]
        if stored is not None and not is_stale(stored, claim):
            began.append((stored["began"], stored["predicted_in"]))
        return min(began, key=lambda pair: pair[0])

    def require(self, claim: Claim, runs: Path) -> None:
        """Raises a UserError if the prediction was changed after its runs in a folder began."""
        if not self.is_of(claim):
            raise UserError(
                f"The claim {claim.label} is stale: it was changed after its runs began in {runs} "
                f"({self.began}), so give the changed one another name, or --runs another folder."
            )


def _file(claim: Claim, runs: Path) -> Path:
    return runs / f"{claim.label}.claim.json"


def read_preregistration(claim: Claim, runs: Path) -> Preregistration | None:
    """Read a claim's preregistration; None if nothing was run.

    Raises:
        UserError: the file is damaged.
    """
    remedy = "give --runs another folder"
    return read_versioned(_file(claim, runs), VERSION, _parse, remedy=remedy)


def _parse(content: dict[str, Any]) -> Preregistration:
    runs = {
        str(arm): {int(seed): str(folder) for seed, folder in seeds.items()}
        for arm, seeds in content["runs"].items()
    }
    digest, began = str(content["digest"]), str(content["began"])
    return Preregistration(digest=digest, commit=content["commit"], began=began, runs=runs)


def write_preregistration(preregistration: Preregistration, claim: Claim, runs: Path) -> None:
    content = {"version": VERSION, "claim": claim.label, **asdict(preregistration)}
    write_json(content, _file(claim, runs))


def register(claim: Claim, jobs: Sequence[ClaimJob], runs: Path, *, commit: str | None) -> None:
    """Store that jobs are about to run; ``commit`` has the prediction of a claim without any run.

    Raises:
        UserError: the file is damaged, or the claim or the config of a job was changed after runs
            began, perhaps by new defaults of the code: an arm would mix old and new runs.
    """
    stored = read_preregistration(claim, runs)
    preregistration = stored or Preregistration(digest=claim.digest, commit=commit)
    preregistration.require(claim, runs)
    for job in jobs:
        seeds = preregistration.runs.setdefault(job.arm, {})
        if (earlier := seeds.setdefault(job.seed, job.name)) != job.name:
            raise UserError(
                f"{claim.label} has run {job.arm} at seed {job.seed} in {earlier}, and its "
                f"config is now that of {job.name}: continue from the commit that made those "
                "runs, or give --runs another folder and run all of it again."
            )
    write_preregistration(preregistration, claim, runs)


def predicted_in(
    file: Path, claim: Claim, stored: Stored | None, *, unpredicted: bool = False
) -> str | None:
    """The commit that had a claim's prediction before its runs, which a stored result of the same
    prediction names; None for a prediction in no commit if ``unpredicted``.

    Raises:
        UserError: no commit has the prediction.
    """
    if stored and not is_stale(stored, claim) and stored["predicted_in"]:
        return str(stored["predicted_in"])
    try:
        return commit_of(file)
    except UserError:
        if unpredicted:
            return None
        raise


def commit_of(file: Path) -> str:
    """The last commit that changed a file.

    Raises:
        UserError: the file is in no Git repository, or has changes that are not committed.
    """
    # Git commits a symbolic link itself, not the file that it points to.
    real = file.resolve()
    if _git(real, "rev-parse", "--is-inside-work-tree") != "true":
        raise UserError(
            f"{file} is in no Git repository, so nobody could tell whether the prediction came "
            f"before its runs: commit it (git init, git add, git commit), {TRIAL}."
        )
    # An ignored file has an empty status and no commit.
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
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None

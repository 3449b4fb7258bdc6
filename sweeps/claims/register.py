"""What has been started for a claim, and which prediction stood when the first of it was.

A file beside the runs, ``LABEL.claim.json``. It is what makes a verdict: every seed that was ever
started is in it and none is dropped, and a claim that has been changed since is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mtp_lightning.errors import UserError
from mtp_lightning.run.atomic import write_json
from mtp_lightning.run.status import now
from mtp_lightning.stored import read_json
from sweeps.claims.claim import Claim
from sweeps.claims.jobs import ClaimJob

VERSION = 1
T = TypeVar("T")


@dataclass(kw_only=True)
class Register:
    """Attributes:
    digest: of the claim, when its first run was asked for.
    commit: that the prediction was in then; None for a trial, whose prediction was in none.
    began: when that was.
    runs: by arm and seed, the folder of the run.
    """

    digest: str
    commit: str | None
    began: str = field(default_factory=now)
    runs: dict[str, dict[int, str]] = field(default_factory=dict)

    def is_of(self, claim: Claim) -> bool:
        """Whether the prediction still is what it was."""
        return self.digest == claim.digest

    def add(self, claim: Claim, jobs: Sequence[ClaimJob]) -> None:
        """Take jobs in.

        Raises:
            UserError: an arm at a seed has another config than when it was run, as after a change
                of the code's defaults: old and new runs would be one arm.
        """
        for job in jobs:
            known = self.runs.setdefault(job.arm, {}).setdefault(job.seed, job.folder)
            if known != job.folder:
                raise UserError(
                    f"{claim.label} has run {job.arm} at seed {job.seed} in {known}, and its "
                    f"config is now that of {job.folder}: go on from the commit that those runs "
                    "were made from, or give --runs another folder and run all of it anew."
                )


def file_of(claim: Claim, runs: Path) -> Path:
    """Where a claim's register is."""
    return runs / f"{claim.label}.claim.json"


def read_register(claim: Claim, runs: Path) -> Register | None:
    """A claim's register; None where nothing was run.

    Raises:
        UserError: its file is damaged.
    """
    return read_stored(file_of(claim, runs), VERSION, _parse, remedy="give --runs another folder")


def _parse(content: dict[str, Any]) -> Register:
    return Register(
        digest=str(content["digest"]),
        commit=content["commit"],
        began=str(content["began"]),
        runs={
            str(arm): {int(seed): str(folder) for seed, folder in seeds.items()}
            for arm, seeds in content["runs"].items()
        },
    )


def write_register(register: Register, claim: Claim, runs: Path) -> None:
    """Store a claim's register."""
    content = {
        "version": VERSION,
        "claim": claim.label,
        "digest": register.digest,
        "commit": register.commit,
        "began": register.began,
        "runs": register.runs,
    }
    write_json(content, file_of(claim, runs))


def read_stored(
    file: Path, version: int, parse: Callable[[dict[str, Any]], T], *, remedy: str
) -> T | None:
    """What a file holds; None where there is none.

    Args:
        file: with ``version`` among its keys.
        version: the one that is understood.
        parse: from the content to what is wanted.
        remedy: what to do with a file that cannot be read.

    Raises:
        UserError: it is damaged, or of another version.
    """
    if not file.exists():
        return None
    try:
        content = read_json(file)
        if content["version"] != version:
            raise UserError(f"version {content['version']}")
        return parse(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read as version {version} of this file ({error}): {remedy}."
        ) from error

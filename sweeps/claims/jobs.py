"""What a claim has to run: an arm at a seed, in a folder named by what it computes.

The same composed config is the same run, whichever claim asks for it, so that claims share their
control arms. Housekeeping, and what is the same however it is set, is left out of the name.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from mtp_lightning.errors import UserError
from mtp_lightning.paths import app
from mtp_lightning.run.config import flatten, has_bearing, is_plain, key_of, lies_in
from sweeps.claims.claim import CPU, Claim
from sweeps.compose import compose_run, count_processes, settle
from sweeps.process import Task, python_command

# Of every run. One thread: its bits, and its seconds, are then the same beside other jobs.
_FIXED = {
    CPU: ("trainer.accelerator=cpu", "trainer.num_threads=1", "logger=csv"),
    "gpu": ("trainer.accelerator=cuda", "logger=csv"),
}
# Keys whose value may be another arm, whose run of the same seed is meant: ARM@STEP, or ARM.
_BRANCH, _START = "branch_from", "init_from"
# Keys that came after results were stored, with the value under which they change nothing.
_LATER = {"branch_from": None, "data.train_windows": "all"}
# What weighs and trains depths, where there are none.
OF_DEPTHS = ("mtp", "mtp_lambda", "lambda_schedule", "balance", "objective")


@dataclass(frozen=True, kw_only=True)
class ClaimJob:
    """An arm at a seed.

    Attributes:
        arm: its name.
        seed: of the run.
        folder: the run's, below the folder of all runs; says what the run computes.
        overrides: for the command line.
        max_steps: optimizer steps that it is given.
        processes: that train together.
        parent: folder of the run that it branches or starts from; None of one that begins anew.
    """

    arm: str
    seed: int
    folder: str
    overrides: tuple[str, ...]
    max_steps: int
    processes: int
    parent: str | None = None

    def task(self, runs: Path) -> Task:
        """It as a task of a pool.

        Args:
            runs: the folder of all runs, absolute.
        """
        folder = runs / self.folder
        return Task(
            folder=folder,
            overrides=self.overrides,
            command=python_command(app("train"), self.overrides, folder),
            processes=self.processes,
            max_steps=self.max_steps,
            on_cpu="trainer.accelerator=cpu" in self.overrides,
            labels=(self.arm, f"seed={self.seed}"),
        )


def jobs(claim: Claim, seeds: Sequence[int], runs: Path) -> list[ClaimJob]:
    """All arms at all seeds, seed by seed: whatever has run when it is interrupted is balanced.

    An arm with ``branch_from=ARM@STEP`` goes on from that arm's run of the same seed, and one with
    ``init_from=ARM`` starts from the weights of that run; both stand after it.

    Args:
        claim: whose arms they are.
        seeds: in the order wanted.
        runs: the folder of all runs, absolute.

    Raises:
        UserError: an arm does not compose, or branches from one that is not listed before it.
    """
    arms = {arm: _Arm(claim, arm) for arm in claim.arms}
    found: list[ClaimJob] = []
    for seed in seeds:
        of_seed: dict[str, ClaimJob] = {}
        for name, arm in arms.items():
            of_seed[name] = arm.job(seed, runs, of_seed)
        found += of_seed.values()
    return found


def digest(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of what a resolved config computes.

    Args:
        config: nested.
    """
    flat = {
        key: value
        for key, value in flatten(dict(config)).items()
        if has_bearing(key) and not (key in _LATER and value == _LATER[key])
    }
    if is_plain(flat.get("mtp.depth"), flat.get("mtp._target_")):
        flat = {key: value for key, value in flat.items() if not lies_in(key, OF_DEPTHS)}
    text = json.dumps(flat, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Arm:
    """An arm's config, composed once for all seeds."""

    def __init__(self, claim: Claim, arm: str) -> None:
        self._name = arm
        given = claim.overrides(arm)
        named = [(key_of(o), o.partition("=")[2]) for o in given]
        # Any other value of init_from is a path.
        links = [
            (key, value)
            for key, value in named
            if key == _BRANCH or (key == _START and value in list(claim.arms))
        ]
        self._key, value = (links or [("", "")])[-1]
        self._parent, _, self._step = (
            value.rpartition("@") if self._key == _BRANCH else (value, "", "")
        )
        if links and self._parent not in list(claim.arms)[: list(claim.arms).index(arm)]:
            wanted = "an optimizer step, as in long@600" if self._key == _BRANCH else "no step"
            raise UserError(
                f"The arm {arm} of the claim {claim.name} has {self._key}={value}: name an "
                f"arm that is listed before it and {wanted}."
            )
        own = tuple(o for o in given if key_of(o) != self._key or not links)
        self._overrides = (*own, *_FIXED[claim.setting])
        try:
            self._composed = compose_run(self._overrides)
        except ValueError as error:
            raise UserError(f"The arm {arm} of the claim {claim.name}: {error}") from error

    def job(self, seed: int, runs: Path, before: Mapping[str, ClaimJob]) -> ClaimJob:
        """This arm at a seed, whose arms before it are known."""
        composed = copy.deepcopy(self._composed)
        link: tuple[str, ...] = ()
        parent = None
        with open_dict(composed):
            composed.seed = seed
            if self._parent:
                parent = before[self._parent].folder
                at = f"@{self._step}" if self._step else ""
                link = (f"{self._key}={runs / parent}{at}",)
                # Its name says what it computes, wherever the folder of runs is.
                composed[self._key] = f"{parent}{at}"
        settled = settle(composed, runs / "run")
        return ClaimJob(
            arm=self._name,
            seed=seed,
            folder=_folder(settled, seed),
            overrides=(*self._overrides, *link, f"seed={seed}"),
            max_steps=settled["trainer"]["max_steps"],
            processes=count_processes(settled),
            parent=parent,
        )


def _folder(settled: dict[str, Any], seed: int) -> str:
    """``sequential_depth-2_seed-0_0123456789ab``: to be found by people, and told apart."""
    depth, target = settled["mtp"]["depth"], str(settled["mtp"]["_target_"])
    head = "none" if is_plain(depth, target) else f"{target.split('.')[-2]}_depth-{depth}"
    return f"{head}_seed-{seed}_{digest(settled)}"

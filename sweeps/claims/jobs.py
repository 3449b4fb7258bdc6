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
from mtp_lightning.run.config import flatten, has_bearing, is_plain, lies_in
from sweeps.claims.claim import CPU, Claim
from sweeps.compose import compose_run, count_processes, settle
from sweeps.process import Task, python_command

# Of every run. One thread: its bits, and its seconds, are then the same beside other jobs.
_FIXED = {
    CPU: ("trainer.accelerator=cpu", "trainer.num_threads=1", "logger=csv"),
    "gpu": ("trainer.accelerator=cuda", "logger=csv"),
}
# What weighs and trains depths, where there are none.
_OF_DEPTHS = ("mtp", "mtp_lambda", "lambda_schedule", "balance", "objective")


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
    """

    arm: str
    seed: int
    folder: str
    overrides: tuple[str, ...]
    max_steps: int
    processes: int

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

    Args:
        claim: whose arms they are.
        seeds: in the order wanted.
        runs: the folder of all runs, absolute.

    Raises:
        UserError: an arm does not compose.
    """
    arms = {arm: _Arm(claim, arm) for arm in claim.arms}
    return [arm.job(seed, runs) for seed in seeds for arm in arms.values()]


def digest(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of what a resolved config computes.

    Args:
        config: nested.
    """
    flat = {key: value for key, value in flatten(dict(config)).items() if has_bearing(key)}
    if is_plain(flat.get("mtp.depth"), flat.get("mtp._target_")):
        flat = {key: value for key, value in flat.items() if not lies_in(key, _OF_DEPTHS)}
    text = json.dumps(flat, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Arm:
    """An arm's config, composed once for all seeds."""

    def __init__(self, claim: Claim, arm: str) -> None:
        self._name = arm
        self._overrides = (*claim.overrides(arm), *_FIXED[claim.setting])
        try:
            self._composed = compose_run(self._overrides)
        except ValueError as error:
            raise UserError(f"The arm {arm} of the claim {claim.name}: {error}") from error

    def job(self, seed: int, runs: Path) -> ClaimJob:
        composed = copy.deepcopy(self._composed)
        with open_dict(composed):
            composed.seed = seed
        settled = settle(composed, runs / "run")
        return ClaimJob(
            arm=self._name,
            seed=seed,
            folder=_folder(settled, seed),
            overrides=(*self._overrides, f"seed={seed}"),
            max_steps=settled["trainer"]["max_steps"],
            processes=count_processes(settled),
        )


def _folder(settled: dict[str, Any], seed: int) -> str:
    """``sequential_depth-2_seed-0_0123456789ab``: to be found by people, and told apart."""
    depth, target = settled["mtp"]["depth"], str(settled["mtp"]["_target_"])
    head = "none" if is_plain(depth, target) else f"{target.split('.')[-2]}_depth-{depth}"
    return f"{head}_seed-{seed}_{digest(settled)}"

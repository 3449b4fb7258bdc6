"""The runs of a claim: an arm at a seed, in a folder named by a digest of its config.

Two claims with the same composed config share the run, for example that of a control arm. The
digest leaves out settings that do not change what is computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from mtp_lightning.errors import UserError
from mtp_lightning.run.config import (
    LATER,
    affects_training,
    flatten,
    is_plain,
    key_of,
    lies_in,
    values_by_key,
)
from sweeps.claims.claim import CPU, GPU, Claim
from sweeps.claims.decide import MOST_APART
from sweeps.compose import compose_run, settle
from sweeps.plan import job_of
from sweeps.process import Job
from sweeps.report.settings import OF_DEPTHS

# Overrides of every run. With one thread, bits and seconds do not depend on other jobs.
_FIXED = {
    CPU: ("trainer.accelerator=cpu", "trainer.num_threads=1", "logger=csv"),
    GPU: ("trainer.accelerator=cuda", "logger=csv"),
}
# Keys whose value may name another arm (ARM@STEP or ARM): its run of the same seed is used.
_BRANCH, _START = "branch_from", "init_from"


@dataclass(frozen=True, kw_only=True)
class ClaimJob(Job):
    """An arm at a seed; the name of its folder ends in the digest of its config."""

    arm: str  # the arm's name
    seed: int  # the run's
    # Name of the job that it branches or starts from; None for an independent run.
    parent: str | None
    config_dir: Path | None  # the claim's


def jobs(claim: Claim, seeds: Sequence[int], runs: Path) -> list[ClaimJob]:
    """All arms at all seeds, seed by seed, so that an interruption leaves complete seeds. ``runs``
    is the folder of all runs, absolute.

    An arm with ``branch_from=ARM@STEP`` continues that arm's run of the same seed, and one with
    ``init_from=ARM`` starts from the weights of that run; both come after it in the list.

    Raises:
        UserError: an arm does not compose, or branches from one that is not listed before it.
    """
    all_jobs: list[ClaimJob] = []
    for seed in seeds:
        seed_jobs: dict[str, ClaimJob] = {}
        for arm in claim.arms:
            seed_jobs[arm] = _job(claim, arm, seed, runs, earlier=seed_jobs)
        all_jobs += seed_jobs.values()
    return all_jobs


def require_equal(claim: Claim, runs: Path) -> None:
    """Refuse a claim whose runs could never decide a prediction.

    Raises:
        UserError: a prediction compares arms whose steps or FLOPs differ but are said to be equal.
    """
    if claim.equal not in ("steps", "flops"):
        return
    first = {job.arm: job for job in jobs(claim, claim.scale.seeds[:1], runs)}
    flops_by_arm = cache(lambda arm: flops_of(first[arm]))  # composing an arm takes time
    for arm, against in ((p.arm, p.against) for p in claim.predictions if p.against is not None):
        own, other = first[arm], first[against]
        about = f"The claim {claim.label} has equal: {claim.equal} and compares {own.arm}"
        alike = own.max_steps == other.max_steps
        if claim.equal == "steps" and not alike:
            a, b = (job.steps_in_words for job in (own, other))
            raise UserError(
                f"{about} ({a}) with {other.arm} ({b}): give both as many, or write equal: nothing."
            )
        whole = own.max_steps is not None and own.parent is None is other.parent
        if claim.equal == "flops" and alike and whole:
            flops, others = flops_by_arm(arm), flops_by_arm(against)
            gap = abs(flops / others - 1) if flops and others else 0.0
            if gap > MOST_APART["flops"]:
                raise UserError(
                    f"{about} with {other.arm}, whose steps differ by {gap:.1%} in FLOPs: add "
                    "compare.match=flops to shared, or write equal: steps."
                )


def flops_of(job: ClaimJob) -> float | None:
    """A run's training FLOPs by its config; None if they cannot be counted. A branch counts only
    from the step where it begins, as if all steps cost the same."""
    from mtp_lightning.experiment.build import training_flops

    overrides = [o for o in job.overrides if key_of(o) not in (_BRANCH, _START)]
    config = compose_run(overrides, job.config_dir)
    # A model from elsewhere has a trunk of other sizes, and a task sets T itself.
    if config.init_from is not None or config.data.seq_len is None:
        return None
    tokenizer = config.tokenizer or {}
    of_bytes = tokenizer.get("_target_") == "data_modules.tokenizers.ByteTokenizer"
    vocabulary = 257 if of_bytes else tokenizer.get("vocab_size")
    if vocabulary is None:  # known only when the tokenizer is read
        return None
    try:
        total = training_flops(config, vocabulary)
    except (OSError, UserError, ArithmeticError):
        return None
    return total * (1 - (branch_step(job.overrides) or 0) / config.trainer.max_steps)


def config_digest(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that identify what a resolved, nested config computes."""
    flat = {
        key: value
        for key, value in flatten(dict(config)).items()
        if affects_training(key) and not (key in LATER and value == LATER[key])
    }
    if is_plain(flat.get("mtp.depth"), flat.get("mtp._target_")):
        flat = {key: value for key, value in flat.items() if not lies_in(key, OF_DEPTHS)}
    text = json.dumps(flat, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def branch_step(overrides: Iterable[str]) -> int | None:
    """The optimizer step at which a run branches from another; None if it does not."""
    step = values_by_key(overrides).get(_BRANCH, "").rpartition("@")[2]
    return int(step) if step.isdecimal() else None


def _job(
    claim: Claim, arm: str, seed: int, runs: Path, *, earlier: Mapping[str, ClaimJob]
) -> ClaimJob:
    """An arm at a seed; ``earlier`` has the same seed's jobs of the arms that are listed before."""
    overrides = (*claim.overrides(arm), *_FIXED[claim.setting])
    link: tuple[str, ...] = ()
    parent: str | None = None
    values = values_by_key(overrides)
    # A value of init_from that is not an arm's name is a path.
    key = _BRANCH if _BRANCH in values else _START if values.get(_START) in claim.arms else None
    if key is not None:
        value = values[key]
        named = value.rpartition("@")[0] if key == _BRANCH else value
        if named not in earlier:
            expected = "an optimizer step, as in long@600" if key == _BRANCH else "no step"
            raise UserError(
                f"The arm {arm} of the claim {claim.name} has {key}={value}: name an arm that is "
                f"listed before it and {expected}."
            )
        parent = earlier[named].name
        value = parent + value.removeprefix(named)
        link = (f"{key}={runs / value}",)
        overrides = tuple(o for o in overrides if key_of(o) != key)
    try:
        composed = compose_run((*overrides, f"seed={seed}"), claim.config_dir)
    except ValueError as error:
        raise UserError(f"The arm {arm} of the claim {claim.name}: {error}") from error
    if key is not None:
        with open_dict(composed):
            composed[key] = value  # the digest does not depend on where the folder of runs is
    settled = settle(composed, runs / "run")
    job = job_of(
        settled,
        runs / _folder(settled, seed),
        (*overrides, *link, f"seed={seed}"),
        labels=(arm, f"seed={seed}"),
        config_dir=claim.config_dir,
    )
    return ClaimJob(**vars(job), arm=arm, seed=seed, parent=parent, config_dir=claim.config_dir)


def _folder(settled: dict[str, Any], seed: int) -> str:
    """``sequential_depth-2_seed-0_0123456789ab``: readable, and unique by its digest."""
    depth, target = settled["mtp"]["depth"], str(settled["mtp"]["_target_"])
    head = "none" if is_plain(depth, target) else f"{target.split('.')[-2]}_depth-{depth}"
    return f"{head}_seed-{seed}_{config_digest(settled)}"

"""Runs the missing jobs of claims like those of a sweep, so that they can be resumed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mtp_lightning.errors import UserError, counted
from mtp_lightning.run.status import describe_failure, read_status, state_of, write_status
from sweeps.claims.claim import Claim
from sweeps.claims.jobs import ClaimJob, jobs
from sweeps.claims.preregistration import register
from sweeps.claims.result import read_results
from sweeps.claims.reuse import left_to_run, shared_runs
from sweeps.interrupts import alone
from sweeps.plan import PlannedJob, SweepPlan, must_run
from sweeps.pool import make_pool


def run(
    claims: Sequence[Claim],
    runs: Path,
    *,
    commits: Mapping[str, str | None],
    seeds: Sequence[int] | None = None,
    arms: Collection[str] | None = None,
    results: Path | None = None,
    n_jobs: int = 1,
    retry_failed: bool = False,
    command: Sequence[str] = (),
) -> int:
    """Run all unfinished arms of claims, seed by seed, and return how many runs are not done.

    Args:
        runs: the folder of all claims' runs, absolute; it need not exist.
        commits: the commit of each prediction, by the claim's label; None for a trial.
        seeds: by default each claim's own, as are ``arms``.
        results: the folder of results; runs that are done there are not run again.
        command: the command line, for ``sweep.json``.

    Raises:
        UserError: a prediction was changed after its runs began, an arm does not compose, its
            config differs from that of its earlier runs, or a result is damaged.
        BlockingIOError: another process runs claims in this folder.
        Stopped: Ctrl-C or SIGTERM; the jobs have saved and ended.
    """
    if n_jobs < 1:
        raise UserError(f"--jobs {n_jobs}: give a whole number of at least 1.")
    stored = {} if results is None else read_results(results)
    requested = {
        claim.label: [
            job
            for job in left_to_run(claim, seeds or claim.scale.seeds, runs, stored.get(claim.label))
            if arms is None or job.arm in arms
        ]
        for claim in claims
    }
    shared = {claim.label: shared_runs(claim, stored.values()) for claim in claims}
    busy = f"Claims are being run in {runs}: wait for that, or stop it."
    with alone(runs, busy, "The same command continues."):
        for claim in claims:
            register(claim, requested[claim.label], runs, commit=commits[claim.label])
        todo = _in_turn(
            [job for job in batch if job.name not in shared[label]]
            for label, batch in requested.items()
        )
        if not todo:
            print("Nothing to run: every run is done.", flush=True)
            return 0
        todo = _with_parents(todo, claims, runs)
        plan = SweepPlan(runs)  # with which the report reads the folder like any sweep's
        folders = {planned.folder for planned in plan.jobs}
        plan.jobs += [PlannedJob(j.name, j.overrides) for j in todo if j.name not in folders]
        plan.write(command)
        waiting = [job for job in todo if must_run(job.folder, retry_failed=retry_failed)]
        print(
            f"{counted(len(todo), 'run')} in {runs}, {len(todo) - len(waiting)} ended before",
            flush=True,
        )
        for job in waiting:
            if not read_status(job.folder):
                write_status(job.folder, job.overrides, "pending")
        if waiting:
            unfinished = {job.name for job in waiting}
            make_pool(waiting, n_jobs=n_jobs).run(
                _ready([*waiting], unfinished), ended=lambda job: unfinished.discard(job.name)
            )
    return _say_unfinished(todo)


def _in_turn(requested: Iterable[Sequence[ClaimJob]]) -> list[ClaimJob]:
    """All claims' jobs, ordered by seed, claim and arm; a shared job comes once."""
    by_seed: dict[int, dict[str, ClaimJob]] = {}
    for claim_jobs in requested:
        for job in claim_jobs:
            by_seed.setdefault(job.seed, {}).setdefault(job.name, job)
    return [job for seed_jobs in by_seed.values() for job in seed_jobs.values()]


def _with_parents(todo: Sequence[ClaimJob], claims: Iterable[Claim], runs: Path) -> list[ClaimJob]:
    """The jobs, each after the runs that it branches or starts from, unless those are done here. A
    stored result has a parent's numbers but not its checkpoints."""
    ordered: dict[str, ClaimJob] = {}
    seeds = list(dict.fromkeys(job.seed for job in todo if job.parent is not None))
    by_name = {job.name: job for claim in claims if seeds for job in jobs(claim, seeds, runs)}
    for job in todo:
        missing = []
        parent = job.parent
        while parent is not None and parent not in ordered and state_of(runs / parent) != "done":
            missing.append(by_name[parent])
            parent = by_name[parent].parent
        ordered |= {added.name: added for added in (*reversed(missing), job)}
    return list(ordered.values())


def _ready(waiting: list[ClaimJob], unfinished: Collection[str]) -> Iterator[ClaimJob | None]:
    """Jobs in order; one that branches from another comes once that is no longer ``unfinished``,
    and later jobs do not wait for it. None while all jobs wait."""
    while waiting:
        job = next((job for job in waiting if job.parent not in unfinished), None)
        if job is not None:
            waiting.remove(job)
        yield job


def _say_unfinished(todo: Sequence[ClaimJob]) -> int:
    """Print every job that is not done, and return how many these are."""
    unfinished = [job.folder for job in todo if state_of(job.folder) != "done"]
    for folder in unfinished:
        print(describe_failure(folder), flush=True)
    if any(state_of(folder) == "failed" for folder in unfinished):
        print("--retry-failed starts failed runs again, from what they have saved.", flush=True)
    return len(unfinished)

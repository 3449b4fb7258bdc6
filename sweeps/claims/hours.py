"""Lists claims, estimates how long their missing runs take on this machine, and plans what fits.

A pending run is assumed to take as long as the finished seeds of its arm took on this machine, or
elsewhere if no run at all has finished here. Without one, its FLOPs are divided by the median rate
of all finished runs. Without a rate, it gets its share of the minutes that its claim expects. Every
estimate names its source.
"""

from __future__ import annotations

import heapq
import importlib.util
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mtp_lightning.errors import UserError
from mtp_lightning.system import this_machine
from sweeps.claims.claim import Claim, is_stale
from sweeps.claims.decide import UNDECIDED
from sweeps.claims.jobs import ClaimJob, flops_of, jobs
from sweeps.claims.observe import ArmRun, Arms, observe
from sweeps.claims.power import seeds_needed
from sweeps.claims.preregistration import read_preregistration
from sweeps.claims.result import Result, in_order, state, with_own_costs
from sweeps.claims.reuse import shared_runs, with_stored
from sweeps.claims.words import aligned

MEASURED, ELSEWHERE = "measured", "measured elsewhere"
BY_FLOPS, EXPECTED = "by FLOPs", "as the claim expects"


@dataclass(frozen=True)
class Cost:
    """The estimated wall time of a pending run on one core."""

    arm: str
    seed: int
    hours: float
    source: str  # a name above


@dataclass(frozen=True)
class Pending:
    """A claim with its number of finished runs, and the costs of the pending ones, seed by seed."""

    claim: Claim
    done: int
    costs: tuple[Cost, ...]

    @property
    def hours(self) -> float:
        """Core-hours of all pending runs."""
        return sum(cost.hours for cost in self.costs)

    @property
    def seeds(self) -> list[int]:
        """The pending seeds, in the order in which they run."""
        return list(dict.fromkeys(cost.seed for cost in self.costs))

    @property
    def sources(self) -> str:
        """The number of costs by source: ``12 measured, 3 by FLOPs``."""
        counts = Counter(cost.source for cost in self.costs)
        return ", ".join(f"{n} {source}" for source, n in counts.items())


def pending_of(
    claims: Sequence[Claim], runs: Path, results: Mapping[str, Result], *, count_flops: bool = True
) -> list[Pending]:
    """The pending runs of claims. A run that several claims share counts for the first of them, and
    not at all if another claim has finished it and measured as much.

    Args:
        claims: in the order in which they would run.
        runs: the folder of all claims' runs, absolute; it need not exist.
        results: all claims' results, by label.
        count_flops: compose pending runs to find shared ones and to count FLOPs, a few seconds per
            arm; otherwise all count, and arms without a finished seed get the time that their claim
            expects.
    """
    observed = [_runs(claim, runs, results) for claim in claims]
    done = [[r for seeds in arms.values() for r in seeds.values() if r.done] for arms in observed]
    pace = _Pace.of([run for claim_runs in done for run in claim_runs])
    planned_before: set[str] = set()
    pending = []
    for claim, arms, finished in zip(claims, observed, done, strict=True):
        shared = shared_runs(claim, results.values()).keys()
        costs = _costs(claim, arms, pace, runs, shared, planned_before, count_flops=count_flops)
        pending.append(Pending(claim, len(finished), tuple(costs)))
    return pending


@dataclass(frozen=True)
class _Pace:
    """The speed of the finished runs: those of this machine, or all if none has finished here."""

    machine: str  # whose runs count; empty for any machine
    rate: float | None  # median FLOPs per second; None if unknown

    @classmethod
    def of(cls, finished: Sequence[ArmRun]) -> _Pace:
        local = cls(this_machine(), None).of_machine(finished)
        rates = [
            run.costs["flops"] / (run.minutes * 60)
            for run in local or finished
            if run.costs.get("flops") and run.minutes > 0
        ]
        return cls(this_machine() if local else "", median(rates) if rates else None)

    def of_machine(self, runs: Iterable[ArmRun]) -> list[ArmRun]:
        """The finished runs on the machine, or on its GPU, whose name follows."""
        return [run for run in runs if run.done and (run.machine or "").startswith(self.machine)]

    def hours(
        self, runs: Iterable[ArmRun], job: ClaimJob | None, expected: float
    ) -> tuple[float, str]:
        """The hours of a run by its arm's runs, its job's FLOPs, or its claim; and their source."""
        if minutes := [run.minutes for run in self.of_machine(runs)]:
            return median(minutes) / 60, MEASURED if self.machine else ELSEWHERE
        if self.rate is not None and job is not None and (flops := flops_of(job)) is not None:
            return flops / self.rate / 3600, BY_FLOPS
        return expected / 60, EXPECTED


def _costs(
    claim: Claim,
    arms: Arms,
    pace: _Pace,
    runs: Path,
    shared: Collection[str],
    planned_before: set[str],
    *,
    count_flops: bool,
) -> list[Cost]:
    """The costs of a claim's pending runs. Runs that another claim has finished (``shared``) or
    that an earlier claim runs (``planned_before``) are left out; the others are added to it."""
    seeds = claim.scale.seeds
    pending = [(arm, seed) for seed in seeds for arm in arms if not arms[arm][seed].done]
    composed_seeds = dict.fromkeys(seed for _, seed in pending) if count_flops else ()
    composed = {(job.arm, job.seed): job for job in jobs(claim, [*composed_seeds], runs)}
    expected = claim.scale.minutes / (len(claim.arms) * len(seeds))
    estimates = []
    arm_costs: dict[str, tuple[float, str]] = {}  # the seeds of an arm cost the same
    for arm, seed in pending:
        job = composed.get((arm, seed))
        if job is not None:
            if job.name in shared or job.name in planned_before:
                continue
            planned_before.add(job.name)
        if arm not in arm_costs:
            arm_costs[arm] = pace.hours(arms[arm].values(), job, expected)
        estimates.append(Cost(arm, seed, *arm_costs[arm]))
    return estimates


def _runs(claim: Claim, runs: Path, results: Mapping[str, Result]) -> Arms:
    """A claim's runs, from this folder and from the results."""
    stored = read_preregistration(claim, runs)
    started = stored.runs if stored and stored.is_of(claim) else {}
    try:
        arms = with_stored(observe(claim, runs, started), claim, results)
    except UserError:  # the folder has runs of other configs: use the stored ones
        arms = with_stored(observe(claim, runs, {}), claim, results)
    return {
        arm: {s: with_own_costs(claim, arm, run) for s, run in arm_runs.items()}
        for arm, arm_runs in arms.items()
    }


def fitting(
    pending: Sequence[Pending], *, hours: float, cores: int
) -> list[tuple[Pending, list[int]]]:
    """The seeds that end in time, claim by claim in the given order.

    A seed fits if all its arms do. Seeds stay in the claim's order; if the next one does not fit,
    the next claim is tried. Each run of a claim goes to the first free core, and a claim begins
    when the previous one has ended.
    """
    chosen, began = [], 0.0
    for item in pending:
        fits: list[int] = []
        ends = began
        for count in range(1, len(item.seeds) + 1):
            seeds = item.seeds[:count]
            duration = makespan([c.hours for c in item.costs if c.seed in seeds], cores)
            if began + duration > hours:
                break
            fits, ends = seeds, began + duration
        if fits:
            chosen.append((item, fits))
            began = ends
    return chosen


def makespan(hours: Sequence[float], cores: int) -> float:
    """Hours until the last run ends, if each goes to the first free core."""
    free = [0.0] * max(1, min(cores, len(hours)))
    for duration in hours:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def listing(claims: Sequence[Claim], results: Mapping[str, Result], runs: Path) -> list[str]:
    """One line per claim, decided claims first."""
    rows = []
    for pending in pending_of(in_order(claims, results), runs, results, count_flops=False):
        claim, result = pending.claim, results.get(pending.claim.label)
        entries = [] if result is None or is_stale(result, claim) else result["predictions"]
        verdict = state(claim, result)
        note = f" Superseded by {claim.superseded_by}." if claim.superseded_by else ""
        needed: list[int | None] = []
        if verdict.startswith(UNDECIDED) and importlib.util.find_spec("scipy") is not None:
            needed = seeds_needed(entries, claim.scale.minimum)
        rows.append(
            [
                claim.label,
                f"{sum(e['verdict'] != UNDECIDED for e in entries)}/{len(claim.predictions)}",
                verdict,
                f"{pending.done}/{len(claim.arms) * len(claim.scale.seeds)}",
                str(max((n for n in needed if n is not None), default="")),
                f"{pending.hours:.1f}" if pending.costs else "",
                claim.sentence + note,
            ]
        )
    head = ["claim", "decided", "verdict", "runs", "seeds to decide", "hours left", "claimed"]
    return aligned(head, rows, right=(1, 3, 4, 5))


def costs(pending: Sequence[Pending]) -> list[str]:
    """The pending runs of every claim, and their sum."""
    rows = [[p.claim.label, str(len(p.costs)), f"{p.hours:.2f}", p.sources] for p in pending]
    runs, hours = sum(len(p.costs) for p in pending), sum(p.hours for p in pending)
    rows.append(["all", str(runs), f"{hours:.2f}", ""])
    return aligned(["claim", "runs left", "core-hours", "from"], rows, right=(1, 2))


def planned(pending: Sequence[Pending], *, hours: float, cores: int, more: str = "") -> list[str]:
    """The seeds that fit into a time, and the commands that run them, with the options ``more``."""
    plan = fitting(pending, hours=hours, cores=cores)
    rows = [
        [
            item.claim.label,
            " ".join(map(str, seeds)),
            f"{len(seeds)} of {len(item.seeds)}",
            f"{sum(cost.hours for cost in item.costs if cost.seed in seeds):.2f}",
        ]
        for item, seeds in plan
    ]
    title = f"In {hours:g} hours, {cores} at once:"
    if not rows:
        return [f"{title} not one seed fits."]
    table = aligned(["claim", "seeds", "of those left", "core-hours"], rows, right=(2, 3))
    jobs_ = f" --jobs {cores}" if cores > 1 else ""
    commands = (
        f"{item.claim.command} --seeds {' '.join(map(str, seeds))}{jobs_}{more}"
        for item, seeds in plan
    )
    return [title, "", *table, "", *commands]

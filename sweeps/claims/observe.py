"""What a claim's runs have come to, as plain numbers: all that a verdict is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtp_lightning.run.status import read_status
from sweeps.claims.claim import Claim, Measure
from sweeps.report.compare import wait_of
from sweeps.report.read import Run, read_run
from sweeps.report.statistics import Wait

TAG = "train/loss_depth_0"  # of the curves
# Parts of a run that are a point each: the mean of the steps that were logged in it.
PARTS = 20
COSTS = ("step", "flops", "parameters", "seconds", "tokens")


@dataclass(kw_only=True)
class Seed:
    """One run of an arm.

    Attributes:
        folder: of the run; says what it computes.
        state: as the report has it; only ``done`` is a number.
        reason: why it is not done.
        values: by :func:`key` of the measures, finite ones alone.
        waits: by :func:`key` of the measures of solving: (optimizer step, whether it solved then).
        costs: steps given (``steps``), steps done, FLOPs, parameters, seconds, tokens.
        curve: FLOPs and training loss of the next token (:func:`curve_of`), of arms that have the
            same FLOPs.
        text: fingerprint of what it was evaluated on.
        weights: digest of what it ended with (``interop/weights.py``), where a task was to be
            solved and they are kept.
        commit: of the code.
        machine: as the run describes it.
        started: time, UTC.
        ended: likewise.
    """

    folder: str
    state: str
    reason: str = ""
    values: dict[str, float] = field(default_factory=dict)
    waits: dict[str, tuple[float, bool]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[float, float]] = field(default_factory=list)
    text: str | None = None
    weights: str | None = None
    commit: str | None = None
    machine: str | None = None
    started: str | None = None
    ended: str | None = None

    @property
    def done(self) -> bool:
        return self.state == "done"

    def wait(self, measure: Measure) -> Wait | None:
        """Steps until it solved; None where it has not validated."""
        found = self.waits.get(key(measure))
        return None if found is None else Wait(*found)


Arms = Mapping[str, Mapping[int, Seed]]


def key(measure: Measure) -> str:
    """Of a measure's values in a result: ``moe/max_violation, last 0.5``."""
    return measure.tag if measure.last is None else f"{measure.tag}, last {measure.last:g}"


def observe(claim: Claim, runs: Path, registered: Mapping[str, Mapping[int, str]]) -> Arms:
    """All arms at all seeds that are planned or were ever started.

    Args:
        claim: whose measures are read.
        runs: the folder of all runs.
        registered: by arm and seed, the folder of each run.
    """
    arms: dict[str, dict[int, Seed]] = {}
    for arm in claim.arms:
        folders = registered.get(arm, {})
        seeds = dict.fromkeys([*claim.scale.seeds, *folders])
        arms[arm] = {
            seed: _seed(read_run(runs / folders[seed]), claim)
            if seed in folders
            else Seed(folder="", state="missing", reason="it was not started")
            for seed in seeds
        }
    return arms


def _seed(run: Run, claim: Claim) -> Seed:
    measures = claim.measures
    status = read_status(run.folder) or {}
    seed = Seed(
        folder=run.folder.name,
        state=run.state,
        reason=run.reason,
        started=status.get("started"),
        ended=status.get("ended"),
    )
    waits = {key(m): wait_of(run, m.solved, m.tag) for m in measures if m.solved is not None}
    seed.waits = {name: (wait.time, wait.ended) for name, wait in waits.items() if wait}
    if run.state != "done":
        return seed
    values = {key(m): _value(run, m) for m in measures}
    seed.values = {name: v for name, v in values.items() if v is not None and math.isfinite(v)}
    numbers: dict[str, Any] = {name: run.summary.get(name) for name in COSTS}
    numbers["steps"] = run.config.get("trainer.max_steps")
    seed.costs = {name: float(v) for name, v in numbers.items() if isinstance(v, int | float)}
    if claim.equal == "flops":
        seed.curve = curve_of(run)
    seed.text = None if run.text is None else run.text.fingerprint
    if seed.waits:
        from mtp_lightning.interop.weights import digest_of

        seed.weights = digest_of(run.folder)
    seed.commit, seed.machine = run.fact("git_commit"), run.fact("machine")
    return seed


def _value(run: Run, measure: Measure) -> float | None:
    if measure.last is None:
        return run.final(measure.tag)
    end = run.final("step") or 0.0
    rows = [
        row[measure.tag]
        for row in run.rows
        if measure.tag in row and row["step"] > (1 - measure.last) * end
    ]
    return math.fsum(rows) / len(rows) if rows else None


def curve_of(run: Run) -> list[tuple[float, float]]:
    """FLOPs up to the middle of each part of a finished run, and the mean loss of the part, nats a
    token; empty where a part has no value."""
    steps, flops = run.final("step"), run.final("flops")
    if not steps or not flops:
        return []
    parts: list[list[float]] = [[] for _ in range(PARTS)]
    for row in run.rows:
        if TAG in row:
            parts[min(int((row["step"] - 1) / steps * PARTS), PARTS - 1)].append(row[TAG])
    if not all(parts):
        return []
    return [
        ((i + 0.5) / PARTS * flops, math.fsum(part) / len(part)) for i, part in enumerate(parts)
    ]

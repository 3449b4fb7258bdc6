"""Reads the numbers of a claim's runs: the whole input of a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtp_lightning.run.status import read_status
from sweeps.claims.claim import Claim, ClaimMeasure
from sweeps.claims.weights import digest_of, last_weights
from sweeps.report.compare import wait_of
from sweeps.report.read import RunRecord, read_run
from sweeps.report.statistics import Wait

TAG = "train/loss_depth_0"  # the loss of the curves
# Points of a curve: each is the mean of the steps logged in one of as many equal parts of a run.
PARTS = 20
COSTS = ("step", "flops", "parameters", "seconds", "tokens")


@dataclass(kw_only=True)
class Seed:
    """One run of an arm."""

    folder: str  # the run's name; it ends in the digest of its config
    state: str  # as in the report; only a `done` run counts
    reason: str = ""  # why it is not done
    values: dict[str, float] = field(default_factory=dict)  # finite values, by `key` of the measure
    # Optimizer steps until it solved the task, by `key` of the measure; none without a validation.
    waits: dict[str, Wait] = field(default_factory=dict)
    # Planned steps (`steps`), done steps, FLOPs, parameters, seconds, tokens.
    costs: dict[str, float] = field(default_factory=dict)
    # (FLOPs, training loss of the next token) from `curve_of`, where the claim's arms have the same
    # FLOPs.
    curve: list[tuple[float, float]] = field(default_factory=list)
    text: str | None = None  # fingerprint of the evaluated text
    # Digest of the final weights (`weights.py`), where a task was to be solved and they are
    # kept.
    weights: str | None = None
    commit: str | None = None  # the code's
    machine: str | None = None  # as the run describes it
    started: str | None = None  # UTC time
    ended: str | None = None  # UTC time

    @property
    def done(self) -> bool:
        return self.state == "done"


Arms = Mapping[str, Mapping[int, Seed]]


def key(measure: ClaimMeasure) -> str:
    """The key of a measure's values in a result: ``moe/max_violation, last 0.5``."""
    return measure.tag if measure.last is None else f"{measure.tag}, last {measure.last:g}"


def observe(claim: Claim, runs: Path, registered: Mapping[str, Mapping[int, str]]) -> Arms:
    """Read all arms at all seeds that are planned or were ever started; ``registered`` has each
    run's folder in ``runs``, by arm and seed."""
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


def _seed(run: RunRecord, claim: Claim) -> Seed:
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
    seed.waits = {name: wait for name, wait in waits.items() if wait}
    if run.state != "done":
        return seed
    values = {key(m): _value(run, m) for m in measures}
    seed.values = {name: v for name, v in values.items() if v is not None and math.isfinite(v)}
    numbers: dict[str, Any] = {name: run.summary.get(name) for name in COSTS}
    numbers["steps"] = run.config.get("trainer.max_steps")
    seed.costs = {name: float(v) for name, v in numbers.items() if isinstance(v, int | float)}
    if claim.equal == "flops":
        seed.curve = curve_of(run)
    seed.text = run.text.fingerprint
    if seed.waits:
        weights = last_weights(run.folder)
        seed.weights = None if weights is None else digest_of(weights)
    seed.commit, seed.machine = run.fact("git_commit"), run.fact("machine")
    return seed


def _value(run: RunRecord, measure: ClaimMeasure) -> float | None:
    if measure.last is None:
        return run.final(measure.tag)
    end = run.final("step") or 0.0
    rows = [
        row[measure.tag]
        for row in run.rows
        if measure.tag in row and row["step"] > (1 - measure.last) * end
    ]
    return math.fsum(rows) / len(rows) if rows else None


def curve_of(run: RunRecord) -> list[tuple[float, float]]:
    """(FLOPs up to its middle, mean loss in nats per token) of each part of a finished run; empty
    if a part has no value."""
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

"""Reads the numbers of a claim's runs: the whole input of a verdict."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_lightning.run.layout import CHECKPOINTS, LAST
from mtp_lightning.run.status import read_status
from sweeps.claims.claim import Claim, ClaimMeasure, Stored
from sweeps.report.compare import wait_of
from sweeps.report.read import RunRecord, read_run
from sweeps.report.statistics import Wait

if TYPE_CHECKING:
    from torch import Tensor

TAG = "train/loss_depth_0"  # the loss of the curves
# Points of a curve: each is the mean of the steps logged in one of as many equal parts of a run.
POINTS = 20
COSTS = ("step", "flops", "parameters", "seconds")


@dataclass(kw_only=True)
class ArmRun:
    """One run of an arm."""

    folder: str  # the run's name; it ends in the digest of its config
    state: str  # as in the report; only a `done` run counts
    reason: str = ""  # why it is not done
    values: dict[str, float] = field(default_factory=dict)  # finite values, by the measure's `key`
    # Optimizer steps until it solved the task, by the measure's `key`; none without a validation.
    waits: dict[str, Wait] = field(default_factory=dict)
    # Planned steps (`steps`), done steps, FLOPs, parameters, seconds.
    costs: dict[str, float] = field(default_factory=dict)
    # (FLOPs, training loss of the next token) from `curve_of`, where the claim's arms have the same
    # FLOPs.
    curve: list[tuple[float, float]] = field(default_factory=list)
    text: str | None = None  # fingerprint of the evaluated text
    # Digest of the final weights (`digest_of`), where a task is to be solved and they are kept.
    weights: str | None = None
    commit: str | None = None  # the code's
    machine: str | None = None  # as the run describes it
    started: str | None = None  # UTC time
    ended: str | None = None  # UTC time

    @classmethod
    def from_json(cls, stored: Stored) -> ArmRun:
        """A run of an arm in a result; older ones have no curves."""
        waits = {
            key: Wait(float(time), bool(solved)) for key, (time, solved) in stored["waits"].items()
        }
        curve = [(float(x), float(y)) for x, y in stored.get("curve", [])]
        return cls(**{**stored, "waits": waits, "curve": curve})

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def minutes(self) -> float:
        """Its wall time in minutes. A continued run only knows its last start, so its training time
        is the lower bound."""
        training = self.costs.get("seconds", 0.0) / 60
        if not (self.done and self.started and self.ended):
            return training
        took = datetime.fromisoformat(self.ended) - datetime.fromisoformat(self.started)
        return max(training, took.total_seconds() / 60)


Arms = Mapping[str, Mapping[int, ArmRun]]


def observe(claim: Claim, runs: Path, registered: Mapping[str, Mapping[int, str]]) -> Arms:
    """Read all arms at all seeds that are planned or were ever started; ``registered`` has each
    run's folder in ``runs``, by arm and seed."""
    missing = ArmRun(folder="", state="missing", reason="it was not started")
    folders = {arm: registered.get(arm, {}) for arm in claim.arms}
    return {
        arm: {
            seed: _observed(read_run(runs / seeds[seed]), claim) if seed in seeds else missing
            for seed in dict.fromkeys([*claim.scale.seeds, *seeds])
        }
        for arm, seeds in folders.items()
    }


def _observed(run: RunRecord, claim: Claim) -> ArmRun:
    measures = claim.measures
    status = read_status(run.folder)
    waits = {m.key: wait_of(run, m.solved, m.tag) for m in measures if m.solved is not None}
    arm_run = ArmRun(
        folder=run.folder.name,
        state=run.state,
        reason=run.reason,
        waits={key: wait for key, wait in waits.items() if wait},
        started=status.get("started"),
        ended=status.get("ended"),
    )
    if run.state != "done":
        return arm_run
    values = {m.key: _value(run, m) for m in measures}
    arm_run.values = {key: v for key, v in values.items() if v is not None and math.isfinite(v)}
    costs = {name: run.final(name) for name in COSTS} | {
        # Matching may have set other steps than the config.
        "steps": run.fact("compare", "max_steps") or run.config.get("trainer.max_steps")
    }
    arm_run.costs = {name: float(v) for name, v in costs.items() if isinstance(v, int | float)}
    if claim.equal == "flops":
        arm_run.curve = curve_of(run)
    arm_run.text = run.text.fingerprint
    if arm_run.waits:
        weights = last_weights(run.folder)
        arm_run.weights = None if weights is None else digest_of(weights)
    arm_run.commit, arm_run.machine = run.fact("git_commit"), run.fact("machine")
    return arm_run


def _value(run: RunRecord, measure: ClaimMeasure) -> float | None:
    if measure.last is None:
        return run.final(measure.tag)
    end = run.final("step") or 0.0
    values = [
        row[measure.tag]
        for row in run.rows
        if measure.tag in row and row["step"] > (1 - measure.last) * end
    ]
    return math.fsum(values) / len(values) if values else None


def curve_of(run: RunRecord) -> list[tuple[float, float]]:
    """(FLOPs up to its middle, mean loss in nats per token) of each part of a finished run; empty
    if a part has no value."""
    steps, flops = run.final("step"), run.final("flops")
    if not steps or not flops:
        return []
    parts: list[list[float]] = [[] for _ in range(POINTS)]
    for row in run.rows:
        if math.isfinite(row.get(TAG, math.nan)):
            parts[min(int((row["step"] - 1) / steps * POINTS), POINTS - 1)].append(row[TAG])
    if not all(parts):
        return []
    return [
        ((i + 0.5) / POINTS * flops, math.fsum(part) / len(part)) for i, part in enumerate(parts)
    ]


def last_weights(run: Path) -> dict[str, Tensor] | None:
    """The final weights in a run's folder, by the model's own names; None if they are not kept."""
    from mtp_lightning.run.checkpoints import intact
    from mtp_lightning.run.loading import model_weights, read_checkpoint

    file = run / CHECKPOINTS / LAST
    if not file.is_file() or not intact(file):
        return None
    _, checkpoint = read_checkpoint(file, needs=("state_dict",))
    return {name: tensor.contiguous() for name, tensor in model_weights(checkpoint).items()}


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and numbers of weights."""
    import torch

    sha256 = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()

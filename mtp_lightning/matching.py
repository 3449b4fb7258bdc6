"""Fair comparisons: matches a run with heads to a reference run's parameters or FLOPs.

* ``parameters`` removes trunk layers to make up for the heads (the protocol of Gloeckle et al.
  2024).
* ``flops`` changes the number of optimizer steps so that the whole run costs the reference's FLOPs.

Layers and steps are whole numbers, so a difference remains, which is reported.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig, n_weights
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.objective.balance.base import Balance
from mtp_lightning.objective.cost import StepCost
from mtp_lightning.objective.objective import CROSS_ENTROPY, Objective
from mtp_lightning.objective.plan import depths_of
from mtp_lightning.objective.schedule.base import LambdaSchedule, Progress
from mtp_lightning.run.layout import SUMMARY_FILE
from mtp_lightning.stored import read_json

# The most points of a run at which the cost of a step is computed; it is constant between them.
_SAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Length:
    """The length of a run."""

    seq_len: int  # T
    max_steps: int  # optimizer steps
    tokens_per_step: int  # positions of one optimizer step, all ranks
    stored_states: bool = False  # whether the trunk's states are read, and not computed


@dataclass(frozen=True)
class Reference:
    """The run or model that a run is compared with."""

    name: str  # in messages
    parameters: int  # number of weights, including heads
    flops: float  # training FLOPs of the whole run


@dataclass(frozen=True)
class Matched:
    """The result of matching a run to a reference."""

    match: str  # ``parameters`` or ``flops``
    reference: str  # the reference's name
    n_layers: int  # trunk layers of this run
    max_steps: int  # optimizer steps of this run, unless it stops earlier
    target: float  # the reference's parameters or FLOPs
    reached: float  # this run's parameters or FLOPs

    @property
    def remaining(self) -> float:
        """The remaining difference, relative to the reference."""
        return self.reached / self.target - 1

    def used(self, flops: float) -> Matched:
        """The result for a run that stopped early, with the FLOPs that it has used."""
        return replace(self, reached=flops) if self.match == "flops" else self

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data for the summary."""
        return {**asdict(self), "remaining": self.remaining}

    def __str__(self) -> str:
        layers, steps = f"{self.n_layers} trunk layers", f"{self.max_steps} steps"
        changed = layers if self.match == "parameters" else steps
        return (
            f"compare.match={self.match}: {changed}; {self.reached:.6g} {self.match} against "
            f"{self.target:.6g} of {self.reference} ({self.remaining:+.2%} remain)"
        )


def plain_reference(config: ModelConfig, length: Length) -> Reference:
    """The same trunk without MTP, trained for as many steps."""
    plain = ModelConfig(trunk=config.trunk, mtp=NoMTPConfig())
    return Reference(
        name="the same trunk with mtp=none",
        parameters=plain.num_params(),
        flops=StepCost(plain).per_token(length.seq_len) * length.tokens_per_step * length.max_steps,
    )


def run_reference(folder: str | Path) -> Reference:
    """A finished run, from its ``summary.json``.

    Raises:
        FileNotFoundError: there is no summary: the folder is not a run's, or the run is unfinished.
        UserError: the summary lacks parameters or FLOPs, or they are not above 0.
    """
    file = Path(folder) / SUMMARY_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"compare.reference={folder} holds no summary.json: give the folder of a finished run."
        )
    try:
        summary = read_json(file)
        parameters, flops = int(summary["parameters"]), float(summary["flops"])
        if not (parameters > 0 and 0 < flops < math.inf):
            raise ValueError(f"{parameters:,} parameters, {flops:g} FLOPs")
        return Reference(name=str(folder), parameters=parameters, flops=flops)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{file} does not say what its run cost ({type(error).__name__}: {error}): "
            "give the folder of a finished run."
        ) from error


def match_parameters(config: ModelConfig, target: int) -> ModelConfig:
    """Remove trunk layers until the number of parameters is as close to ``target`` as possible.

    Raises:
        UserError: the trunk has too few layers.
    """
    best = config
    for n_layers in range(config.trunk.n_layers - 1, 0, -1):
        try:
            fewer = replace(config, trunk=replace(config.trunk, n_layers=n_layers))
        except ValueError:  # the trunk's config does not allow so few layers
            break
        if abs(fewer.num_params() - target) >= abs(best.num_params() - target):
            return best
        best = fewer
    excess = best.num_params() - target
    if excess > n_weights(best.on_meta().trunk.blocks[-1]) / 2:
        raise UserError(
            f"compare.match=parameters cannot be met: with {best.trunk.n_layers} trunk layers left "
            f"the model still has {excess:,} parameters more than the reference's {target:,}. "
            "Take fewer MTP depths or a deeper trunk."
        )
    return best


def total_flops(
    cost: StepCost, schedule: LambdaSchedule, length: Length, balance: Balance
) -> float:
    """Training FLOPs of a whole run. A depth whose weight is 0 at a step costs nothing in it.

    The FLOPs include measurements of the balance rule and extra passes of the objective. Balance
    rules that learn count with their initial state.
    """
    steps = length.max_steps
    samples = min(steps, _SAMPLES)
    main = balance.needs_main(cost.config.mtp)
    per_token = partial(cost.per_token, length.seq_len, main=main, stored=length.stored_states)
    costs: dict[tuple[tuple[int, ...], bool], float] = {}
    total = 0.0
    for sample in range(samples):
        step = (2 * sample + 1) * steps // (2 * samples)
        tokens = step * length.tokens_per_step
        progress = Progress(step=step, max_steps=steps, tokens=tokens)
        lambdas = [1.0, *schedule.lambdas(progress)]
        rests = balance.rests_at(progress)
        kind = tuple(depths_of(lambdas)), rests
        if kind not in costs:
            costs[kind] = 0.0
            for chance, active in balance.active_sets(lambdas):
                flops: float = per_token(active)
                if balance.scope is not None and not rests:
                    measured = per_token(active, scope=balance.scope)
                    flops += 1 / balance.every_n_steps * (measured - flops)
                costs[kind] += chance * flops
        total += costs[kind]
    return total / samples * steps * length.tokens_per_step


def follows_tokens(schedule: LambdaSchedule, length: Length, max_steps: int) -> bool:
    """Whether the depths that a run of ``max_steps`` trains depend on the tokens that it reads."""

    def depths(step: int, tokens: int) -> list[int]:
        progress = Progress(step=step, max_steps=max_steps, tokens=tokens)
        return depths_of([1.0, *schedule.lambdas(progress)])

    steps = range(0, max_steps, max(1, max_steps // _SAMPLES))
    return any(depths(step, 0) != depths(step, step * length.tokens_per_step) for step in steps)


def match_steps(
    cost: StepCost, schedule: LambdaSchedule, target: float, length: Length, balance: Balance
) -> tuple[int, float]:
    """The number of optimizer steps whose FLOPs are closest to ``target``, and those FLOPs."""

    def flops(steps: int) -> float:
        return total_flops(cost, schedule, replace(length, max_steps=steps), balance)

    steps = length.max_steps
    for _ in range(8):  # the cost of a step depends weakly on the length of the run
        nearer = max(round(steps * target / flops(steps)), 1)
        if nearer == steps:
            break
        steps = nearer
    else:  # depths begin or end at a step or token, but a longer run costs more all the same
        steps = bisect_left(range(1 << 40), target, lo=1, key=flops)
    candidates = {s: flops(s) for s in (steps - 1, steps, steps + 1) if s >= 1}
    steps = min(candidates, key=lambda s: abs(candidates[s] - target))
    return steps, candidates[steps]


def match(
    config: ModelConfig,
    schedule: LambdaSchedule,
    length: Length,
    *,
    match: str,
    reference: Reference,
    balance: Balance,
    objective: Objective = CROSS_ENTROPY,
) -> Matched:
    """Find the trunk layers or steps with which a run matches ``reference`` in ``match``:
    ``parameters`` or ``flops``.

    Raises:
        UserError: the trunk has too few layers to remove, or the balance rule does not fit.
    """
    max_steps = length.max_steps
    target: float
    reached: float
    if match == "parameters":
        config, target = match_parameters(config, reference.parameters), reference.parameters
        reached = config.num_params()
    else:
        assert match == "flops"
        balance.check(config, objective)
        target, cost = reference.flops, StepCost(config, objective)
        max_steps, reached = match_steps(cost, schedule, target, length, balance)
    return Matched(
        match=match,
        reference=reference.name,
        n_layers=config.trunk.n_layers,
        max_steps=max_steps,
        target=target,
        reached=reached,
    )

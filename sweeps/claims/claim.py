"""A claim as data: its sentence, its arms, its measure and its predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError

EQUALS = ("steps", "flops", "parameters", "seconds", "nothing")
PARTS = ("total", "effect")
SIDES = ("above", "below", "within")
CPU, GPU = "cpu", "gpu"

Stored = Mapping[str, Any]
"""A claim's result, or a part of it, as its JSON file has it."""


@dataclass(frozen=True, kw_only=True)
class ClaimMeasure:
    """The number that is read from a finished run."""

    tag: str  # a key of `summary.json`
    # The measure is the share of seeds whose value exceeds this level; None for the value itself.
    solved: float | None = None
    # The tag is averaged over the rows of `metrics.csv` in this last part of the run, 0 < last <=
    # 1, for tags that the summary lacks; None to read the summary.
    last: float | None = None
    # Arms of plain runs; the measure is then the compute-equivalent gain in the tag over them, seed
    # by seed (`sweeps/report/equivalent.py`). Empty for the value itself.
    curve: tuple[str, ...] = ()
    # (arm, its plain arms) for arms that are compared with another curve, such as those of another
    # size.
    own_curves: tuple[tuple[str, tuple[str, ...]], ...] = ()
    part: str = "total"  # which gain: `total`, or only its `effect`

    @classmethod
    def from_json(cls, stored: Stored) -> ClaimMeasure:
        """The measure of a prediction in a result; older ones have no curves."""
        own_curves = tuple((arm, tuple(curve)) for arm, curve in stored.get("own_curves", ()))
        return cls(**{**stored, "curve": tuple(stored.get("curve", ())), "own_curves": own_curves})

    @property
    def key(self) -> str:
        """The key of its values in a result: ``moe/max_violation, last 0.5``."""
        return self.tag if self.last is None else f"{self.tag}, last {self.last:g}"

    @property
    def of_run(self) -> ClaimMeasure:
        """The same value of each run, without the comparison with a curve."""
        return replace(self, curve=(), own_curves=(), part="total")

    def curve_of(self, arm: str) -> tuple[str, ...]:
        """Arms of the plain runs that an arm is compared with."""
        return dict(self.own_curves).get(arm, self.curve)

    @property
    def is_ratio(self) -> bool:
        """Whether its values are ratios, which are averaged and compared as logarithms."""
        return bool(self.curve)


@dataclass(frozen=True, kw_only=True)
class ClaimPrediction:
    """One arm, alone or against another, on one side of a threshold."""

    arm: str  # the arm that is measured
    # The arm that is subtracted, seed by seed; None for the arm's own value.
    against: str | None = None
    side: str  # the effect lies `above` by, `below` it, or `within` -by .. by
    by: float = 0.0  # the threshold, in the measure's unit
    expected: float | None = None  # the predicted size; it decides nothing
    published: str = ""  # the source's number, printed next to ours
    measure: ClaimMeasure  # the claim's unless the prediction has its own


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of a claim's runs: the part that differs between CPU and GPU."""

    # Overrides of every arm, instead of the claim's; None for the claim's.
    shared: tuple[str, ...] | None = None
    # Overrides of some arms, instead of the claim's.
    arms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...]  # in the order in which they run
    minimum: int  # nothing is decided with fewer seeds per arm, or pairs of seeds
    minutes: float  # expected for all runs, one after the other, on one CPU core or one GPU


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The content of a claim's file."""

    name: str  # the file's name without `.yaml`
    sentence: str  # the claim in words
    source: str  # the paper that it comes from
    note: str = ""  # information for readers of the verdict
    remark: str = ""  # a comment added after the prediction; the digest leaves it out
    superseded_by: str = ""  # a later claim that asks the same better, "" for none; also left out
    equal: str  # the resource that all arms spend alike; `nothing` if the measure counts the cost
    shared: tuple[str, ...]  # overrides of every arm
    arms: Mapping[str, tuple[str, ...]]  # each arm's overrides, by its name
    measure: ClaimMeasure  # the default of the predictions
    predictions: tuple[ClaimPrediction, ...]  # the claim holds if all of them hold
    scale: Scale  # seeds and sizes of this setting
    setting: str = CPU  # `cpu` or `gpu`
    digest: str  # SHA-256 of the file's values
    # The published scale, where a CPU does not reach it.
    gpu: Scale | None = field(default=None, repr=False)
    # Options that every command on it needs, as typed: `--claims`, `--allow`, `--config-dir`.
    options: str = ""
    config_dir: Path | None = None  # a folder with more configs for its arms, absolute

    @property
    def label(self) -> str:
        """The name of its result files: ``NAME``, or ``NAME.gpu`` at the published scale."""
        return self.name if self.setting == CPU else f"{self.name}.{self.setting}"

    @property
    def command(self) -> str:
        return self.typed("run")

    def typed(self, action: str) -> str:
        """The command line of an action on this claim."""
        flag = "" if self.setting == CPU else f" --{self.setting}"
        return f"python -m sweeps.claims {action} {self.name}{self.options}{flag}"

    def overrides(self, arm: str) -> tuple[str, ...]:
        """All overrides of an arm, in the order in which they are given."""
        shared = self.shared if self.scale.shared is None else self.scale.shared
        return (*shared, *self.scale.arms.get(arm, self.arms[arm]))

    def on_gpu(self) -> Claim:
        """The claim at the published scale.

        Raises:
            UserError: the claim has only one scale.
        """
        if self.gpu is None:
            raise UserError(f"The claim {self.name} has no gpu setting: run it without --gpu.")
        return replace(self, scale=self.gpu, setting=GPU)

    @property
    def scales(self) -> list[Claim]:
        """The claim, and the claim at its published scale if it has one."""
        return [self, *([self.on_gpu()] if self.gpu else [])]

    @property
    def measures(self) -> list[ClaimMeasure]:
        """The values that the predictions read from runs, in their order, without repetition."""
        return list(dict.fromkeys(prediction.measure.of_run for prediction in self.predictions))


def is_stale(result: Stored, claim: Claim) -> bool:
    """Whether the claim was changed since the result's runs began."""
    return bool(result["digest"] != claim.digest)

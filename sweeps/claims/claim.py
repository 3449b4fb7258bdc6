"""A claim as data: what is said, what is run, what is measured, and what would make it hold."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mtp_lightning.errors import UserError

EQUALS = ("steps", "flops", "parameters", "seconds", "nothing")
PARTS = ("total", "effect")
SIDES = ("above", "below", "within")
CPU, GPU = "cpu", "gpu"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is read of a finished run.

    Attributes:
        tag: of ``summary.json``.
        solved: level that the value must exceed; then the measure is the share of seeds that do.
            None for the value itself.
        last: part of the run, from its end, over whose rows of ``metrics.csv`` the tag is averaged,
            for what the summary does not have; 0 < last <= 1. None for the summary.
        curve: arms of plain runs; then the measure is the compute-equivalent gain in the tag
            against them, seed by seed (``sweeps/report/equivalent.py``). Empty for the value.
        own_curves: arms that have another curve than that, such as those of another size, each
            with the arms of its own.
        part: of the gain: ``total``, or its ``effect`` alone.
    """

    tag: str
    solved: float | None = None
    last: float | None = None
    curve: tuple[str, ...] = ()
    own_curves: tuple[tuple[str, tuple[str, ...]], ...] = ()
    part: str = "total"

    @property
    def of_run(self) -> Measure:
        """What is read of each run, whatever is made of it."""
        return replace(self, curve=(), own_curves=(), part="total")

    def curve_of(self, arm: str) -> tuple[str, ...]:
        """Arms of the plain runs that an arm is compared with."""
        return dict(self.own_curves).get(arm, self.curve)

    @property
    def is_ratio(self) -> bool:
        """Whether its values are ratios, which are averaged and compared as logarithms."""
        return bool(self.curve)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One arm, alone or against another, on one side of a threshold.

    Attributes:
        arm: whose measure it is.
        against: the arm that is subtracted, seed by seed; None for the arm's own value.
        side: where the effect lies: above ``by``, below it, or within -by .. by.
        by: the threshold, in the measure's unit.
        expected: the size that is predicted; decides nothing.
        published: the source's own number, beside which ours is printed.
        measure: by default the claim's.
    """

    arm: str
    against: str | None = None
    side: str
    by: float = 0.0
    expected: float | None = None
    published: str = ""
    measure: Measure


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run: what a GPU changes.

    Attributes:
        shared: overrides of every arm, instead of the claim's; None for those.
        arms: overrides of some arms, instead of the claim's.
        seeds: in the order in which they are run.
        minimum: seeds of an arm, or pairs of two, below which nothing is decided.
        minutes: of all runs: two CPU cores, or one GPU.
    """

    shared: tuple[str, ...] | None = None
    arms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...]
    minimum: int
    minutes: float


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a claim's file says.

    Attributes:
        name: of the file.
        sentence: the claim.
        source: who says so.
        note: what a reader of the verdict should know.
        equal: what the arms have the same of; ``nothing`` where the measure itself counts the cost.
        shared: overrides of every arm.
        arms: overrides by name.
        measure: what is measured.
        predictions: all of them have to hold.
        scale: of the setting.
        setting: ``cpu`` or ``gpu``.
        remark: what was learned of it since; no part of the prediction.
        superseded_by: a later claim that asks the same better, likewise; "" for none.
        digest: of all that the file says; comments, and what was said since, do not count.
        gpu: the published scale's, where a CPU does not reach it.
        folder: of the file, as it was typed (``--claims``); "" for the project's own.
    """

    name: str
    sentence: str
    source: str
    note: str = ""
    remark: str = ""
    superseded_by: str = ""
    equal: str
    shared: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]
    measure: Measure
    predictions: tuple[Prediction, ...]
    scale: Scale
    setting: str = CPU
    digest: str
    gpu: Scale | None = field(default=None, repr=False)
    folder: str = ""

    @property
    def label(self) -> str:
        """``NAME``, and ``NAME.gpu`` at the other scale: of the files of its results."""
        return self.name if self.setting == CPU else f"{self.name}.{self.setting}"

    @property
    def command(self) -> str:
        """What runs it."""
        return self.typed("run")

    def typed(self, action: str) -> str:
        """The command line of an action on it, with the options that say which claim is meant."""
        on = "" if self.setting == CPU else f" --{self.setting}"
        where = f" --claims {shlex.quote(self.folder)}" if self.folder else ""
        return f"python -m sweeps.claims {action} {self.name}{where}{on}"

    def overrides(self, arm: str) -> tuple[str, ...]:
        """All overrides of an arm, in the order in which they are given."""
        shared = self.shared if self.scale.shared is None else self.scale.shared
        return (*shared, *self.scale.arms.get(arm, self.arms[arm]))

    def on_gpu(self) -> Claim:
        """The claim at the published scale.

        Raises:
            UserError: it has none.
        """
        if self.gpu is None:
            raise UserError(f"The claim {self.name} has no gpu setting: run it without --gpu.")
        return replace(self, scale=self.gpu, setting=GPU)

    @property
    def measures(self) -> list[Measure]:
        """What is read of runs for the predictions, in their order, each once."""
        return list(dict.fromkeys(prediction.measure.of_run for prediction in self.predictions))

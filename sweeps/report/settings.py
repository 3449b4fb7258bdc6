"""A setting is a group of runs that differ only in the seed; its numbers are means over them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mtp_lightning.run.config import is_plain, lies_in
from mtp_lightning.run.solved import EXACT, SOLVED
from sweeps import digits
from sweeps.report import metrics
from sweeps.report.names import RUN, name_of
from sweeps.report.read import EvaluatedText, RunRecord, SweepRecord
from sweeps.report.statistics import Interval, interval, ratio_interval, share_interval

# Groups that change nothing in a run without MTP depths.
OF_DEPTHS = ("mtp", "mtp_lambda", "lambda_schedule", "balance", "objective")
FOLLOWING = ("data.depth", "data.stride")  # keys of data that follow from mtp's


@dataclass(frozen=True)
class Estimate:
    """A metric of a setting."""

    interval: Interval | None  # mean and interval over its seeds, or None
    gap: str  # why there is no interval; empty if the setting does not have this metric
    values: dict[Any, float]  # finite values by seed


@dataclass(kw_only=True, eq=False)
class Setting:
    """Runs that differ only in the seed, with the same data and the same evaluated text."""

    values: dict[str, Any]  # values of the varied keys
    config: dict[str, Any]  # the first run's config, by dotted key
    runs: list[RunRecord] = field(default_factory=list)  # one per seed
    planned: int = 0  # number of runs in any state, planned ones included

    @property
    def label(self) -> str:
        """The varied keys with their values; ``all runs`` if nothing varies."""
        return self._named(lambda key, value: f"{key}={value}")

    @property
    def name(self) -> str:
        """The label in readable names: ``linear heads, D = 2``."""
        return self._named(name_of)

    def _named(self, describe: Callable[[str, str], str]) -> str:
        """The values of the varied keys, without those that a head or plain training lacks, and
        without those of an option that it does not have (``data.paths`` with ``data=stdlib``)."""
        values = {RUN: self.values[RUN]} if RUN in self.values else self.values
        pairs = [(k, v) for k, v in values.items() if not lacks(k, v)]
        had = [(k, v) for k, v in pairs if v is not None or "." not in k or k in self.config]
        return ", ".join(describe(key, show(value)) for key, value in had or pairs) or "all runs"

    @property
    def done(self) -> list[RunRecord]:
        return [run for run in self.runs if run.state == "done"]

    @property
    def text(self) -> EvaluatedText | None:
        """The text that its finished runs were evaluated on; None if there are none."""
        return self.done[0].text if self.done else None

    @property
    def answers(self) -> bool:
        """Whether its runs answer a task's questions."""
        return any(EXACT in row for run in self.runs for row in (run.summary, *run.rows))

    @property
    def is_plain(self) -> bool:
        """Whether its runs are plain next-token training."""
        return is_plain(self.depth, self.config.get("mtp._target_"))

    @property
    def depth(self) -> int | None:
        """D, tokens predicted beyond the next one."""
        depth = self.config.get("mtp.depth")
        return depth if isinstance(depth, int) else None

    def estimate(self, tag: str) -> Estimate:
        """Mean and interval over the finished runs. If one of them has no number, there is no mean:
        leaving it out would bias the result."""
        finals = {run.seed: run.final(tag) for run in self.done}
        finite = {s: v for s, v in finals.items() if v is not None and math.isfinite(v)}
        if finite and len(finite) == len(finals):
            values = list(finite.values())
            # A user's metric may match the pattern of shares without being one.
            if metrics.is_share(tag) and all(0 <= value <= 1 for value in values):
                return Estimate(share_interval(values), "", finite)
            if tag in metrics.SPEEDS and min(values) > 0:
                return Estimate(ratio_interval(values), "", finite)
            return Estimate(interval(values), "", finite)
        gap = "" if finals else "no finished run"
        if any(value is not None for value in finals.values()):
            gap = f"not a number in {len(finals) - len(finite)} of {len(finals)}"
        return Estimate(None, gap, finite)


@dataclass(kw_only=True)
class Settings:
    """All settings of one or more sweeps."""

    all: list[Setting]  # the settings, ordered by the varied keys' values
    varied: list[str]  # the keys in which they differ, without the seed
    left_out: list[RunRecord]  # runs that repeat a seed of their setting
    sweeps: list[SweepRecord]  # all runs as they were read
    level: float = SOLVED  # a seed solves its task if `val/exact_match` (0 .. 1) is above this

    @property
    def names(self) -> list[str]:
        return [setting.name for setting in self.all]

    @property
    def runs(self) -> list[RunRecord]:
        """All runs, those of no setting included."""
        return [run for sweep in self.sweeps for run in sweep.runs]

    @property
    def running(self) -> bool:
        """Whether some jobs run, or wait for their turn."""
        return any(run.state in ("running", "pending") for run in self.runs)

    @property
    def done(self) -> list[RunRecord]:
        """All finished runs that count."""
        return [run for setting in self.all for run in setting.done]

    @property
    def headline(self) -> metrics.Metric:
        """The main loss: of depth 0 per token, or in bits per byte if the tokenizers differ."""
        tokenizers = {
            json.dumps(run.fact("data", "tokenizer", "fingerprint"))
            for run in self.done
            if isinstance(run.fact("data", "tokenizer"), dict)
        }
        return metrics.BY_TAG[metrics.BITS if len(tokenizers) > 1 else metrics.LOSS]

    @cached_property
    def is_task(self) -> bool:
        """Whether runs answer a task's questions; they are then compared by seeds that solve it."""
        return any(setting.answers for setting in self.all)

    @property
    def compared_tag(self) -> str:
        """The tag by which settings are compared: of the headline metric, or of solving a task."""
        return EXACT if self.is_task else self.headline.tag

    @property
    def columns(self) -> list[metrics.Metric]:
        """The possible columns of the table of settings. A task begins with exact match, then exact
        match on every out-of-distribution set, then the task's other metrics."""
        if not self.is_task:
            return [*metrics.TABLE]
        tags = dict.fromkeys(tag for run in self.done for tag in run.summary)
        matches = (re.fullmatch(r"val/([^/]+)/exact_match", tag) for tag in tags)
        sets = [metrics.Metric(m[0], "Exact match", f"on {m[1]}", "%") for m in matches if m]
        others = [metric for metric in metrics.OF_TASKS if metric.tag in tags]
        return [metrics.ANSWERS, *sets, *others, *metrics.TABLE]


def lacks(key: str, value: Any) -> bool:
    """Whether a value says that a head or plain training has no such key of MTP."""
    return value is None and lies_in(key, OF_DEPTHS)


def is_number(value: Any) -> bool:
    """Whether a value is a number; a switch is not one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def show(value: Any) -> str:
    """A config value as typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return digits(value)
    if isinstance(value, list):
        return "[" + ",".join(show(v) for v in value) + "]"
    return "null" if value is None else str(value)


def order(value: Any) -> tuple[int, float, str]:
    """A sort key: None first, then numbers by size, then other values by name."""
    if value is None or value == "none":
        return (-1, 0.0, "")
    if is_number(value):
        return (0, value, "")
    return (1, 0.0, show(value))

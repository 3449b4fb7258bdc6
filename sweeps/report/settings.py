"""Settings: runs that differ in nothing but the seed, with the means over them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mtp_lightning.run.solved import SOLVED as SOLVED
from sweeps.report.metrics import (
    ANSWERS,
    BESIDE,
    BITS,
    BY_TAG,
    EXACT,
    LOSS,
    TABLE,
    Metric,
    is_share,
)
from sweeps.report.names import name_of
from sweeps.report.read import Run, Text
from sweeps.report.statistics import Interval, interval, share_interval


@dataclass(frozen=True)
class Estimate:
    """A metric of a setting.

    Attributes:
        interval: over its seeds; None is a gap.
        gap: why there is none; empty where the metric does not exist for this setting.
        values: by seed.
    """

    interval: Interval | None
    gap: str
    values: dict[Any, float]


@dataclass(kw_only=True)
class Setting:
    """Runs whose configs are equal but for the seed, trained on the same data and evaluated on
    the same text.

    Attributes:
        values: of the varied keys.
        config: by dotted key, of the first run.
        runs: one a seed.
        planned: runs that this setting has or should have, whatever their state.
    """

    values: dict[str, Any]
    config: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    planned: int = 0

    @property
    def label(self) -> str:
        """The varied keys with their values; ``all runs`` where nothing varies."""
        return ", ".join(f"{k}={show(v)}" for k, v in self.values.items()) or "all runs"

    @property
    def name(self) -> str:
        """The same for people: ``linear heads, D = 2``."""
        return ", ".join(name_of(k, show(v)) for k, v in self.values.items()) or "all runs"

    @property
    def done(self) -> list[Run]:
        return [run for run in self.runs if run.state == "done"]

    @property
    def text(self) -> Text | None:
        """What its finished runs were evaluated on; None where there are none, or they do not
        mention it."""
        return self.done[0].text if self.done else None

    @property
    def answers(self) -> bool:
        """Whether its runs answer a task's questions."""
        return any(EXACT in row for run in self.runs for row in (run.summary, *run.rows))

    @property
    def depth(self) -> int | None:
        """D, tokens predicted beyond the next one."""
        depth = self.config.get("mtp.depth")
        return depth if isinstance(depth, int) else None

    def estimate(self, tag: str) -> Estimate:
        """Mean and interval over the finished runs; a gap where one of them has no number, since
        the mean of the others would be another question's answer."""
        finals = {run.seed: run.final(tag) for run in self.done}
        good = {s: v for s, v in finals.items() if v is not None and math.isfinite(v)}
        if len(good) == len(finals) and good:
            values = list(good.values())
            # A metric of a user's own may have a share's name and be none.
            within = is_share(tag) and all(0 <= value <= 1 for value in values)
            return Estimate((share_interval if within else interval)(values), "", good)
        if not finals:
            return Estimate(None, "no finished run", {})
        if all(value is None for value in finals.values()):
            return Estimate(None, "", {})
        bad = len(finals) - len(good)
        return Estimate(None, f"not a number in {bad} of {len(finals)}", good)


@dataclass(kw_only=True)
class Settings:
    """All settings of one or more sweeps.

    Attributes:
        all: in the order of the varied keys' values.
        varied: the keys that tell them apart, seeds left out.
        left_out: runs that repeat a seed of their setting.
        level: ``val/exact_match`` above which a seed solves its task, of 0 .. 1.
    """

    all: list[Setting]
    varied: list[str]
    left_out: list[Run]
    level: float = SOLVED

    @property
    def done(self) -> list[Run]:
        """All finished runs that count."""
        return [run for setting in self.all for run in setting.done]

    @property
    def headline(self) -> Metric:
        """What settings are compared by: the main depth's loss per token, or bits per byte where
        the tokenizers differ."""
        tokenizers = {
            json.dumps(run.fact("data", "tokenizer", "fingerprint"))
            for run in self.done
            if isinstance(run.fact("data", "tokenizer"), dict)
        }
        return BY_TAG[BITS if len(tokenizers) > 1 else LOSS]

    @cached_property
    def is_task(self) -> bool:
        """Whether runs answer a task's questions: these are compared by how many seeds solve it."""
        return any(setting.answers for setting in self.all)

    @property
    def columns(self) -> list[Metric]:
        """What the table of settings may have; of a task exact match first, then that on every set
        outside of the distribution and what the task reports beside."""
        if not self.is_task:
            return [*TABLE]
        tags = dict.fromkeys(tag for run in self.done for tag in run.summary)
        found = ((tag, re.fullmatch(r"val/([^/]+)/exact_match", tag)) for tag in tags)
        sets = [Metric(tag, "Exact match", f"on {m[1]}", "%") for tag, m in found if m]
        beside = [metric for metric in BESIDE if metric.tag in tags]
        return [ANSWERS, *sets, *beside, *TABLE]


def show(value: Any) -> str:
    """A config value as on the command line."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ",".join(show(v) for v in value) + "]"
    return "null" if value is None else str(value)


def order(value: Any) -> tuple[int, float, str]:
    """None first, then numbers by size, then everything else by name."""
    if value is None or value == "none":
        return (-1, 0.0, "")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (0, float(value), "")
    return (1, 0.0, show(value))

"""Settings: runs that differ in nothing but the seed, and what tells one setting from another."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtp_lightning.run.config import has_bearing
from mtp_lightning.run.layout import SUMMARY_FILE
from sweeps.report.metrics import BITS, BY_TAG, LOSS, Metric
from sweeps.report.read import Run, Sweep
from sweeps.report.statistics import Interval, interval

# Keys that name a setting best, where the command lines do not say which are meant.
_TELLING = (
    "mtp._target_",
    "mtp.depth",
    "mtp_lambda",
    "lambda_schedule._target_",
    "model._target_",
    "model.d_model",
    "model.n_layers",
    "optimizer.lr",
    "trainer.max_steps",
)

FOLDER = "folder"  # the key by which settings of two sweeps are told apart
DATA = "data.fingerprint"  # of the data that a finished run was really trained on


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
    """Runs whose configs are equal but for the seed, trained on the same data.

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
    def done(self) -> list[Run]:
        return [run for run in self.runs if run.state == "done"]

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
            return Estimate(interval(list(good.values())), "", good)
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
    """

    all: list[Setting]
    varied: list[str]
    left_out: list[Run]

    @property
    def done(self) -> list[Run]:
        """All finished runs that count."""
        return [run for setting in self.all for run in setting.done]

    @property
    def headline(self) -> Metric:
        """What settings are compared by: the main depth's loss per token, or bits per byte where
        the tokenizers differ."""
        tokenizers = {
            json.dumps(run.summary["data"]["tokenizer"].get("fingerprint"))
            for run in self.done
            if isinstance(run.summary.get("data"), dict)
            and isinstance(run.summary["data"].get("tokenizer"), dict)
        }
        return BY_TAG[BITS if len(tokenizers) > 1 else LOSS]


def show(value: Any) -> str:
    """A config value as on the command line."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ",".join(show(v) for v in value) + "]"
    return "null" if value is None else str(value)


def collect(sweeps: Sequence[Sweep]) -> Settings:
    """Group the runs of one or more sweeps.

    A run without a config belongs to no setting; it counts as planned for the one that its
    overrides name.
    """
    runs = [run for sweep in sweeps for run in sweep.runs]
    configured = [run for run in runs if run.config]
    follows = _seed_keys(configured)
    groups: dict[str, Setting] = {}
    for run in configured:
        config = _comparable(run, follows)
        key = json.dumps(_computed(config), sort_keys=True, default=str)
        groups.setdefault(key, Setting(values={}, config=config)).runs.append(run)
    settings = [part for setting in groups.values() for part in _by_data(setting)]
    left_out = [run for setting in settings for run in _drop_repeats(setting)]
    asked = [key for sweep in sweeps for key in sweep.varied]
    varied = _name(settings, asked)
    given = {sweep.runs[0].sweep: float(i) for i, sweep in enumerate(sweeps)}
    settings.sort(
        key=lambda setting: [
            (0, given[value], "") if key == FOLDER else order(value)
            for key, value in setting.values.items()
        ]
    )
    _count_planned(settings, [run for run in runs if not run.config])
    return Settings(all=settings, varied=varied, left_out=left_out)


def ignored(key: str) -> bool:
    """Whether a config key tells no setting from another: the seed, and what has no bearing."""
    return key == "seed" or not has_bearing(key)


def _seed_keys(runs: Iterable[Run]) -> set[str]:
    """Keys such as data.seed that are the run's seed in every run."""
    keys = {key for run in runs for key in run.config if "seed" in key.rpartition(".")[2]}
    return {k for k in keys if all(r.config.get(k, r.seed) == r.seed for r in runs)}


def _comparable(run: Run, follows: set[str]) -> dict[str, Any]:
    config = {k: v for k, v in run.config.items() if not ignored(k) and k not in follows}
    if run.sweep:
        config[FOLDER] = run.sweep
    return config


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config is computed: ``mtp=none`` and any other stack of depth 0 are the same."""
    if config.get("mtp.depth") != 0:
        return config
    return {k: v for k, v in config.items() if k == "mtp.depth" or not k.startswith("mtp.")}


def _by_data(setting: Setting) -> list[Setting]:
    """The setting, or, where its runs read different data, one for each of these.

    Equal configs can do that: a text file may have changed between two runs. A run that has not
    ended does not say which it reads, and its curve is not averaged with the others' then.
    """
    if len({str(_data(run)) for run in setting.done}) < 2:
        return [setting]
    parts: dict[str, Setting] = {}
    for run in setting.runs:
        known = "unknown" if _data(run) is None else str(_data(run))[:8]
        part = Setting(values={}, config={**setting.config, DATA: known})
        parts.setdefault(known, part).runs.append(run)
    return list(parts.values())


def _data(run: Run) -> Any:
    data = run.summary.get("data")
    return data.get("fingerprint") if isinstance(data, dict) else None


def _drop_repeats(setting: Setting) -> list[Run]:
    """Keep one run a seed, a finished one and of those the newest: a repeated seed is no second
    sample."""
    best: dict[Any, Run] = {}
    for run in setting.runs:
        other = best.get(run.seed)
        if other is None or _rank(run) >= _rank(other):
            best[run.seed] = run
    dropped = [run for run in setting.runs if best[run.seed] is not run]
    setting.runs = sorted(best.values(), key=lambda run: order(run.seed))
    return dropped


def _rank(run: Run) -> tuple[bool, float]:
    file = run.folder / SUMMARY_FILE
    return run.state == "done", file.stat().st_mtime if file.exists() else 0.0


def _name(settings: list[Setting], asked: list[str]) -> list[str]:
    """Choose the keys that tell the settings apart, and set every setting's values of them.

    First come the keys that the sweeps or the command lines name, then those that are needed to
    tell apart what is still alike.
    """
    given = [key for s in settings for run in s.runs for key in run.overrides]
    named = [*asked, *given]
    # No MTP is what one compares with first, so the depth leads.
    candidates = [FOLDER, *(key for key in named if key == "mtp.depth"), *named]
    chosen: list[str] = []
    for key in dict.fromkeys(candidates):
        values = [_value(setting, key) for setting in settings]
        if not (ignored(key) or key in chosen) and len({show(v) for v in values}) > 1:
            chosen.append(key)
    keys = {key for setting in settings for key in setting.config}
    rest = [k for k in _TELLING if k in keys] + sorted(keys - set(_TELLING))
    for key in rest:
        parts = _parts(settings, chosen)
        if len(parts) == len(settings):
            break
        if len(_parts(settings, [*chosen, key])) > len(parts):
            chosen.append(key)
    for setting in settings:
        setting.values = {_shown_key(key): _value(setting, key) for key in chosen}
    return [_shown_key(key) for key in chosen]


def _parts(settings: list[Setting], keys: list[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(show(_value(setting, key)) for key in keys) for setting in settings)


def _value(setting: Setting, key: str) -> Any:
    """A setting's value of a key of the config, or its choice for a group of the config."""
    if key in setting.config:
        value = setting.config[key]
        return _class_name(value) if key.endswith("._target_") else value
    if key == "mtp" and setting.depth == 0:
        return "none"
    for run in setting.runs:
        if key in run.overrides:
            return run.overrides[key]
        if key in run.choices:
            return run.choices[key]
    return _class_name(setting.config.get(f"{key}._target_"))


def _class_name(target: Any) -> Any:
    """``mtp_lightning.mtp.parallel.ParallelConfig`` -> ``parallel``; a function keeps its name."""
    parts = str(target).split(".")
    if len(parts) < 2:
        return target
    return parts[-2] if parts[-1][:1].isupper() else parts[-1]


def _shown_key(key: str) -> str:
    return key.removesuffix("._target_")


def order(value: Any) -> tuple[int, float, str]:
    """None first, then numbers by size, then everything else by name."""
    if value is None or value == "none":
        return (-1, 0.0, "")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (0, float(value), "")
    return (1, 0.0, show(value))


def _count_planned(settings: list[Setting], unconfigured: list[Run]) -> None:
    for setting in settings:
        setting.planned = len(setting.runs)
        own = {key: show(value) for key, value in setting.values.items()}
        for run in unconfigured:
            asked = {**run.overrides, FOLDER: run.sweep}
            if all(_same(asked.get(key), value) for key, value in own.items()):
                setting.planned += 1


def _same(text: str | None, shown: str) -> bool:
    try:
        return text is not None and (text == shown or float(text) == float(shown))
    except ValueError:
        return False

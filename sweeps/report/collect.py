"""Groups runs into settings (runs that differ only in the seed), and names settings by the keys in
which they differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mtp_lightning.run.config import affects_training, is_plain, lies_in
from mtp_lightning.run.layout import SUMMARY_FILE
from mtp_lightning.run.solved import SOLVED
from sweeps import grouped
from sweeps.report.metrics import first_few
from sweeps.report.names import RUN
from sweeps.report.read import RunRecord, SweepRecord
from sweeps.report.settings import OF_DEPTHS, Setting, Settings, lacks, order, show

# Keys that describe a setting best, if the command lines do not name the varied ones.
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

FOLDER = "folder"  # the key that separates settings of two sweeps
_LONGEST = 80  # letters of a name that is still readable; longer ones are of unrelated runs
DATA = "data.fingerprint"  # of the data that a finished run was trained on
TEXT = "evaluation.fingerprint"  # of the documents that it was evaluated on


def collect(sweeps: Sequence[SweepRecord], *, level: float = SOLVED) -> Settings:
    """Group the runs of one or more sweeps; ``level`` is :attr:`Settings.level`.

    A run without a config belongs to no setting; it counts as planned for the one that its
    overrides name.
    """
    runs = [run for sweep in sweeps for run in sweep.runs]
    configured = [run for run in runs if run.config]
    follows = _seed_keys(configured)
    groups: dict[str, Setting] = {}
    for run in configured:
        config = {k: v for k, v in run.config.items() if not ignored(k) and k not in follows}
        config |= {FOLDER: run.sweep} if run.sweep else {}
        # As typed: 1 and 1.0 compute the same.
        key = json.dumps({k: show(v) for k, v in _computed(config).items()}, sort_keys=True)
        groups.setdefault(key, Setting(values={}, config=config)).runs.append(run)
    settings = list(groups.values())
    settings = _apart(settings, DATA, _data, lambda run: _data(run)[:8])
    settings = _apart(settings, TEXT, lambda run: run.text.same, lambda run: run.text.short)
    left_out = [run for setting in settings for run in _drop_repeats(setting)]
    varied = _name(settings, [key for sweep in sweeps for key in sweep.varied])
    sweep_order = {sweep.runs[0].sweep: float(i) for i, sweep in enumerate(sweeps)}
    settings.sort(
        key=lambda setting: [
            (0, sweep_order[value], "") if key == FOLDER else order(value)
            for key, value in setting.values.items()
        ]
    )
    _count_planned(settings, [run for run in runs if not run.config])
    return Settings(
        all=settings, varied=varied, left_out=left_out, sweeps=list(sweeps), level=level
    )


def ignored(key: str) -> bool:
    """Whether a key separates no settings: the seed, and keys that do not change the numbers. A
    branch equals, to the last bit, a run of its config that was never branched."""
    return key in ("seed", "branch_from") or not affects_training(key)


def _seed_keys(runs: Iterable[RunRecord]) -> set[str]:
    """Keys such as data.seed whose value is the run's seed in every run."""
    keys = {key for run in runs for key in run.config if "seed" in key.rpartition(".")[2]}
    return {k for k in keys if all(r.config.get(k, r.seed) == r.seed for r in runs)}


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that changes what is computed: plain training has no settings of MTP."""
    if not is_plain(config.get("mtp.depth"), config.get("mtp._target_")):
        return config
    return {k: v for k, v in config.items() if k == "mtp.depth" or not lies_in(k, OF_DEPTHS)}


def _apart(
    settings: list[Setting],
    key: str,
    identity: Callable[[RunRecord], Any],
    name: Callable[[RunRecord], str],
) -> list[Setting]:
    """Split settings whose finished runs differ in ``identity``; ``key`` names the parts.

    Runs of equal configs differ if a text file, or the evaluated part of it, has changed between
    them. An unfinished run does not say which text it reads, so its curve is then not averaged with
    the others.
    """
    if all(len({identity(run) for run in setting.done}) < 2 for setting in settings):
        return settings
    parts: list[Setting] = []
    for setting in settings:
        kinds = {identity(run): name(run) for run in setting.done}
        if len(kinds) < 2:
            setting.config[key] = next(iter(kinds.values()), "unknown")
            parts.append(setting)
            continue
        groups = grouped(((run.state == "done", identity(run)), run) for run in setting.runs)
        for (done, _), runs in groups.items():
            config = {**setting.config, key: name(runs[0]) if done else "unknown"}
            parts.append(Setting(values={}, config=config, runs=runs))
    return parts


def _data(run: RunRecord) -> str:
    return str(run.fact("data", "fingerprint") or "unknown")


def _drop_repeats(setting: Setting) -> list[RunRecord]:
    """Keep one run per seed, the newest finished one: a repeated seed is not a second sample."""
    best = {run.seed: run for run in sorted(setting.runs, key=_rank)}
    dropped = [run for run in setting.runs if best[run.seed] is not run]
    setting.runs = sorted(best.values(), key=lambda run: order(run.seed))
    return dropped


def _rank(run: RunRecord) -> tuple[bool, float]:
    file = run.folder / SUMMARY_FILE
    return run.state == "done", file.stat().st_mtime if file.exists() else 0.0


def _name(settings: list[Setting], sweep_keys: list[str]) -> list[str]:
    """Choose the keys that separate the settings, and set every setting's values of them.

    Keys named by sweeps or command lines come first, then others while two settings are alike.
    """
    named = sweep_keys + [key for s in settings for run in s.runs for key in run.overrides]
    # Most comparisons are with plain training, so the depth comes first.
    candidates = [FOLDER, *(key for key in named if key == "mtp.depth"), *named]
    separating: list[str] = []
    for key in dict.fromkeys(candidates):
        having = [s for s in settings if not _of_mtp(key) or _value(s, key) is not None]
        if not ignored(key) and _n_parts(having, [key]) > 1:
            separating.append(key)
    keys = {key for setting in settings for key in setting.config}
    last = {DATA, TEXT}  # last, because they usually follow from other keys
    other_keys = [k for k in _TELLING if k in keys] + sorted(keys - {*_TELLING, *last})
    other_keys += sorted(keys & last)
    for key in other_keys:
        n = _n_parts(settings, separating)
        if n == len(settings):
            break
        if _n_parts(settings, [*separating, key]) > n:
            separating.append(key)
    names = [key.removesuffix("._target_") for key in separating]
    for setting in settings:
        setting.values = {n: _value(setting, key) for n, key in zip(names, separating, strict=True)}
    if sweep_keys or FOLDER in names or all(len(setting.name) <= _LONGEST for setting in settings):
        return names
    for setting in settings:
        setting.values = {RUN: first_few([run.name for run in setting.runs]), **setting.values}
    return [RUN, *names]


def _n_parts(settings: list[Setting], keys: list[str]) -> int:
    """The number of parts into which some keys separate the settings."""
    return len({tuple(show(_value(setting, key)) for key in keys) for setting in settings})


def _of_mtp(key: str) -> bool:
    """Whether plain training lacks a key."""
    return key not in ("mtp", "mtp._target_", "mtp.depth") and lies_in(key, OF_DEPTHS)


def _value(setting: Setting, key: str) -> Any:
    """A setting's value of a config key, or its choice of a config group; None for one of MTP that
    changes nothing in plain training."""
    if _of_mtp(key) and setting.is_plain:
        return None
    if key in setting.config:
        value = setting.config[key]
        return _class_name(value) if key.endswith("._target_") else value
    if key == "mtp" and setting.is_plain:
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


def _count_planned(settings: list[Setting], unconfigured: list[RunRecord]) -> None:
    for setting in settings:
        shown = {k: show(v) for k, v in setting.values.items() if not lacks(k, v)}
        # What a job without an override of a key has, if one of the setting's runs is such a job.
        given = set.intersection(*(set(run.overrides) for run in setting.runs))
        defaults = {k: v for k, v in shown.items() if k not in given}
        waiting = [
            run
            for run in unconfigured
            for asked in [{**defaults, **run.overrides, FOLDER: run.sweep}]
            if all(_same(asked.get(k), v) for k, v in shown.items())
        ]
        # Jobs of plain training that differ only in keys of MTP are one run of a seed.
        setting.planned = len({run.seed for run in (*setting.runs, *waiting)})


def _same(text: str | None, value: str) -> bool:
    try:
        # Hydra writes a sweep's switches as True and False.
        return text is not None and (text.lower() == value.lower() or float(text) == float(value))
    except ValueError:
        return False

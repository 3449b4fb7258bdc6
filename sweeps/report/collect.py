"""From runs to settings: which runs differ in nothing but the seed, and what tells settings
apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mtp_lightning.run.config import has_bearing, is_plain
from mtp_lightning.run.layout import SUMMARY_FILE
from sweeps.report.read import Run, Sweep
from sweeps.report.settings import SOLVED, Setting, Settings, order, show

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
TEXT = "evaluation.fingerprint"  # of the documents that it was evaluated on


def collect(sweeps: Sequence[Sweep], *, level: float = SOLVED) -> Settings:
    """Group the runs of one or more sweeps; ``level`` is :attr:`Settings.level`.

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
    settings = list(groups.values())
    settings = _apart(settings, DATA, lambda run: str(run.fact("data", "fingerprint")), _data_name)
    settings = _apart(settings, TEXT, lambda run: run.text and run.text.same, _text_name)
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
    return Settings(all=settings, varied=varied, left_out=left_out, level=level)


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
    """What of a config is computed: ``mtp=none`` and any other stack without depths are the
    same."""
    if not _is_plain(config):
        return config
    return {k: v for k, v in config.items() if k == "mtp.depth" or not k.startswith("mtp.")}


def _is_plain(config: dict[str, Any]) -> bool:
    return is_plain(config.get("mtp.depth"), config.get("mtp._target_"))


def _apart(
    settings: list[Setting], key: str, same: Callable[[Run], Any], name: Callable[[Run], str]
) -> list[Setting]:
    """The settings, or, where the finished runs of one differ in what ``same`` gives, one for each
    of these, named by the key.

    Equal configs can do that: a text file may have changed between two runs, or what is evaluated
    of it. A run that has not ended does not say which it reads, and its curve is not averaged with
    the others' then.
    """
    if all(len({same(run) for run in setting.done}) < 2 for setting in settings):
        return settings
    parts: list[Setting] = []
    for setting in settings:
        kinds = {same(run): name(run) for run in setting.done}
        only = next(iter(kinds.values()), "unknown") if len(kinds) < 2 else None
        found: dict[Any, Setting] = {}
        for run in setting.runs:
            done = run.state == "done"
            kind = only or (name(run) if done else "unknown")
            part = Setting(values={}, config={**setting.config, key: kind})
            found.setdefault(only or (done, same(run)), part).runs.append(run)
        parts += found.values()
    return parts


def _data_name(run: Run) -> str:
    digest = run.fact("data", "fingerprint")
    return "unknown" if digest is None else str(digest)[:8]


def _text_name(run: Run) -> str:
    return "not mentioned" if run.text is None else run.text.short


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
    last = {DATA, TEXT}  # which follow from other keys, if any
    rest = [k for k in _TELLING if k in keys] + sorted(keys - {*_TELLING, *last})
    rest += sorted(keys & last)
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
    if key == "mtp" and _is_plain(setting.config):
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

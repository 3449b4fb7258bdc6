"""The answer in sentences, and what a reader must know before believing it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sweeps.report.comparable import by_text, refusal
from sweeps.report.comparisons import Comparison, sparse
from sweeps.report.context import contexts
from sweeps.report.findings_task import how_many_solve, task_caveats, which_differ
from sweeps.report.metrics import (
    BITS,
    BY_TAG,
    EXACT,
    PER_STEP,
    SPEEDUP,
    Metric,
    equals,
    number,
    p_value,
)
from sweeps.report.metrics import with_interval as shown
from sweeps.report.read import STATES, Run, Sweep
from sweeps.report.settings import Setting, Settings
from sweeps.report.text_error import error_of_text
from sweeps.report.texts import text_of


def answer(settings: Settings, comparisons: Sequence[Comparison], runs: Sequence[Run]) -> list[str]:
    """What came out, in a few sentences computed from the data."""
    sentences = [_count(settings, runs)]
    headline = settings.headline
    groups = by_text(settings.all)
    task = settings.is_task
    if not any(_ranked(group, EXACT if task else headline.tag) for group in groups):
        what = EXACT if task else "a validation loss"
        return [*sentences, f"No setting has a finished run with {what} yet."]
    sentences += [text for text in [refusal(settings.all)] if text]
    # Within each text; one setting alone on its text is the best of nothing.
    shown_groups = groups if len(groups) == 1 else [group for group in groups if len(group) > 1]
    wheres = [_where(group) if len(groups) > 1 else "" for group in shown_groups]
    for group, where in zip(shown_groups, wheres, strict=True):
        best = how_many_solve(group, settings.level) if task else _best(group, headline)
        sentences += [f"{where}{text}" for text in best]
    compared = [c for c in comparisons if not c.refused]
    sentences += which_differ(compared) if task else _differences(compared, headline)
    for group, where in zip(shown_groups, wheres, strict=True):
        sentences += _fastest(group, where)
    return sentences


def _where(group: Sequence[Setting]) -> str:
    text = group[0].text
    what = "questions" if group[0].answers else "text"
    return f"Of those on {what} {text.short}: " if text else f"Of those that mention no {what}: "


def _best(group: Sequence[Setting], metric: Metric) -> list[str]:
    ranked = _ranked(group, metric.tag)
    if not ranked:
        return []
    found = ranked[0].estimate(metric.tag).interval
    assert found is not None
    many = len(ranked) > 1
    which = f"The lowest validation loss of the main depth has {ranked[0].label}" * many
    text = which or "Validation loss of the main depth"
    error = error_of_text(ranked[0]) if metric.tag == BITS else None
    beside = f"; the text's own standard error is {metric.show(error)}" if error else ""
    return [f"{text}: {shown(found, metric)} {metric.unit}{_seeds(found.n)}{beside}."]


def _fastest(group: Sequence[Setting], where: str) -> list[str]:
    fastest = _ranked(group, SPEEDUP, largest=True)
    if not fastest:
        return []
    top = fastest[0]
    speed = top.estimate(SPEEDUP).interval
    steps = top.estimate(PER_STEP).interval
    assert speed is not None
    text = f"{where}Decoding with drafts is fastest, against plain decoding, with {top.label}: "
    text += f"{shown(speed, BY_TAG[SPEEDUP])} times as fast"
    if steps:
        text += f", at {shown(steps, BY_TAG[PER_STEP])} tokens per verify pass"
    if speed.mean <= 1:
        text += ". So no setting gains by its drafts"
    elif speed.half is not None and speed.mean - speed.half <= 1:
        text += ". The interval reaches below 1: a gain is not shown"
    return [text + "."]


def _count(settings: Settings, runs: Sequence[Run]) -> str:
    counts = Counter(run.state for run in runs)
    parts = [f"{counts[state]} {state}" for state in STATES if counts[state]]
    seeds = {run.seed for run in runs if run.seed is not None}
    return (
        f"{_plural(len(settings.all), 'setting')}, {_plural(len(seeds), 'seed')}, "
        f"{_plural(len(runs), 'run')}: {', '.join(parts)}."
    )


def _differences(comparisons: Sequence[Comparison], metric: Metric) -> list[str]:
    if not comparisons:
        return []
    sentences = [_constant(c, metric) for c in comparisons if c.result and c.result.constant]
    tested = [c for c in comparisons if c.adjusted is not None]
    if not tested:
        lacking = "No difference can be tested: that takes two seeds that both settings have."
        return sentences or [lacking]
    beyond = [c for c in tested if c.differs]
    for c in sorted(beyond, key=lambda c: c.adjusted or 0)[:4]:
        assert c.result is not None
        mean = c.result.difference.mean
        sentences.append(
            f"{c.setting.label} is {'better' if mean < 0 else 'worse'} than with {c.against} by "
            f"{number(abs(mean), 4)} {metric.unit}, beyond noise "
            f"(paired t-test over {c.result.difference.n} seeds, Holm's p {equals(c.adjusted)})."
        )
    if len(beyond) > 4:
        sentences.append(f"So are {len(beyond) - 4} more, in the table of differences.")
    within = len(tested) - len(beyond)
    if not beyond:
        closest = min((c.adjusted for c in tested if c.adjusted is not None), default=1.0)
        sentences.append(
            f"No {'other ' * bool(sentences)}setting's loss differs from its reference's by more "
            f"than the seeds' noise ({_plural(len(tested), 'paired t-test')}, smallest p after "
            f"Holm's correction {p_value(closest)})."
        )
    elif within:
        sentences.append(f"{_plural(within, 'other difference')} {_is(within)} within noise.")
    if within and sparse(comparisons):
        sentences.append("With fewer than five seeds only large differences can be seen at all.")
    return sentences


def _constant(found: Comparison, metric: Metric) -> str:
    assert found.result is not None
    mean, n = found.result.difference.mean, found.result.difference.n
    if mean == 0:
        return f"{found.setting.label} equals {found.against} at all {n} seeds, to the last bit."
    return (
        f"{found.setting.label} differs from {found.against} by {number(mean, 4)} {metric.unit} at "
        f"all {n} seeds, to the last bit: that is a fact about this data, and has no test."
    )


def caveats(settings: Settings, sweeps: Sequence[Sweep]) -> list[str]:
    """What may make numbers incomparable, or is missing."""
    runs = [run for sweep in sweeps for run in sweep.runs]
    done = [run for run in runs if run.state == "done"]
    notes = [text for text in [refusal(settings.all)] if text] + contexts(settings.all)
    mentioned = [run for run in done if text_of(run)]
    if len(done) > 1 and not mentioned:
        notes.append(
            "No run mentions the text that it was evaluated on (older ones do not): the losses "
            "and rates of acceptance are compared as if it were one, which is unknown."
        )
    notes += [note for sweep in sweeps for note in sweep.notes]
    notes += [f"{run.name}: {note}." for run in runs for note in run.notes]
    for run in settings.left_out:
        notes.append(f"{run.name} repeats a seed of its setting and is left out of all means.")
    differing = {
        "data": ("" if mentioned else "Losses per token and bits per byte are of different texts. ")
        + "Runs with different data are never averaged together.",
        "tokenizer": "Losses per token do not compare across tokenizers: compare bits per byte.",
    }
    for what, meaning in differing.items():
        if len(kinds := _kinds(done, what)) > 1:
            notes.append(f"The runs have {len(kinds)} different {what} fingerprints. {meaning}")
    for what, meaning in (
        ("git_commit", "Differences may come from the code."),
        ("machine", "Seconds and speeds do not compare."),
        ("world_size", "Seconds do not compare."),
    ):
        if len(kinds := _kinds(done, what)) > 1:
            counted = "; ".join(f"{kind[:60]} ({n})" for kind, n in kinds.most_common(4))
            notes.append(f"The runs differ in {what.replace('_', ' ')}: {counted}. {meaning}")
    packages = sorted({name for run in done for name in _versions(run)})
    for package in packages:
        kinds = Counter(str(_versions(run).get(package, "unknown")) for run in done)
        if len(kinds) > 1:
            counted = ", ".join(f"{kind} ({n})" for kind, n in kinds.most_common(4))
            notes.append(f"The runs differ in the version of {package}: {counted}.")
    notes += task_caveats(settings)
    for setting in settings.all:
        gaps: dict[str, list[str]] = {}
        for metric in settings.columns:
            if (gap := setting.estimate(metric.tag).gap) and setting.done:
                gaps.setdefault(gap, []).append(metric.tag)
        notes += [f"{setting.label}: no mean of {', '.join(t)}: {g} runs." for g, t in gaps.items()]
        if 0 < len(setting.done) < setting.planned:
            notes.append(
                f"{setting.label}: means are of {len(setting.done)} of {setting.planned} runs. If "
                "the others failed because of their seed, the mean is too good."
            )
    absent = [run.name for run in done if not any("progress/tokens" in row for row in run.rows)]
    if absent:
        notes.append(
            f"{_plural(len(absent), 'finished run')} logged no tokens, FLOPs and seconds beside "
            f"the losses and {_is(len(absent))} missing from the curves: {_some(absent)}."
        )
    return notes


def _kinds(runs: Sequence[Run], what: str) -> Counter[str]:
    """How many runs have which value of a field of their summaries."""
    kinds: Counter[str] = Counter()
    for run in runs:
        keys = {
            "data": ("data", "fingerprint"),
            "tokenizer": ("data", "tokenizer", "fingerprint"),
        }
        value = run.fact(*keys.get(what, (what,)))
        kinds["unknown" if value is None else json.dumps(value).strip('"')] += 1
    return kinds


def _versions(run: Run) -> dict[str, Any]:
    versions = run.summary.get("versions")
    return versions if isinstance(versions, dict) else {}


def _ranked(settings: Sequence[Setting], tag: str, *, largest: bool = False) -> list[Setting]:
    """Settings with a mean of the metric, the best one first."""
    known = [(found.mean, s) for s in settings if (found := s.estimate(tag).interval)]
    return [s for _, s in sorted(known, key=lambda pair: pair[0], reverse=largest)]


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _is(n: int) -> str:
    return "is" if n == 1 else "are"


def _seeds(n: int) -> str:
    return f" (mean and 95 % interval over {n} seeds)" if n > 1 else " (one seed, no interval)"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")

"""Collects the facts of the report's answer and of its caveats; ``answer.jinja`` and
``caveats.jinja`` have the words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from mtp_lightning.errors import counted
from mtp_lightning.run.solved import EXACT
from sweeps import grouped
from sweeps.report import environment, metrics
from sweeps.report.comparable import by_text, contexts, error_of_text, refusal
from sweeps.report.compare import Comparison, smallest_p, solved_share, time_to_solve, wait_of
from sweeps.report.equivalent import Family
from sweeps.report.metrics import BITS, FLOPS, SPEEDUP
from sweeps.report.read import STATES, RunRecord
from sweeps.report.settings import Setting, Settings
from sweeps.report.statistics import LEVEL

# The names that the templates use.
_WORDS = {
    "equals": metrics.equals,
    "number": metrics.number,
    "p_value": metrics.p_value,
    "counted": counted,
    "first_few": metrics.first_few,
    "shown": metrics.with_interval,
    "spread": metrics.spread,
    "EXACT": EXACT,
    "LEVEL": LEVEL,
    "SPEEDUP": metrics.BY_TAG[SPEEDUP],
    "PER_STEP": metrics.BY_TAG[metrics.PER_STEP],
}


def answer(
    settings: Settings, comparisons: Sequence[Comparison], families: Sequence[Family] = ()
) -> list[str]:
    """The report's answer in a few sentences."""
    runs = settings.runs
    groups = by_text(settings.all)
    has_numbers = any(_ranked(group, settings.compared_tag) for group in groups)
    # Settings are ranked within each text; a setting alone on its text is not ranked.
    ranked = groups if len(groups) == 1 else [group for group in groups if len(group) > 1]
    compared = [c for c in comparisons if not c.refused]
    tested = [c for c in compared if c.adjusted is not None]
    counts = Counter(run.state for run in runs)
    return _sentences(
        "answer.jinja",
        settings=settings.all,
        seeds=len({run.seed for run in runs if run.seed is not None}),
        runs=len(runs),
        states=", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]),
        task=settings.is_task,
        level=f"{settings.level:g}",
        headline=settings.headline,
        refusal=refusal(settings.all),
        has_numbers=has_numbers,
        groups=[_facts(group, settings, named=len(groups) > 1) for group in ranked],
        gains=[arm for family in families for arm in family.arms if arm.total],
        compared=compared,
        constant=[c for c in compared if c.paired and c.paired.constant],
        tested=tested,
        beyond=sorted((c for c in tested if c.differs), key=lambda c: c.adjusted or 0),
        closest=min((c.adjusted for c in tested if c.adjusted is not None), default=1.0),
        # Fewer than five pairs reveal large effects only.
        sparse=any(r.p is not None and r.difference.n < 5 for c in comparisons if (r := c.paired)),
        least=smallest_p(tested),
    )


def _sentences(template: str, **facts: Any) -> list[str]:
    """The lines of a rendered template, one sentence each, without empty lines."""
    jinja = environment("sweeps.report")
    # A name may have several lines.
    jinja.finalize = lambda value: " ".join(str(value).splitlines())
    text = jinja.get_template(template).render(**_WORDS, **facts)
    return [line.strip() for line in text.splitlines() if line.strip()]


def _facts(group: Sequence[Setting], settings: Settings, *, named: bool) -> dict[str, Any]:
    """The facts about the settings of one text."""
    level, metric = settings.level, settings.headline
    text = group[0].text if named else None
    where = f"Of those on evaluation data {text.short}: " if text else ""
    ranked, sped_up = _ranked(group, metric.tag), _ranked(group, SPEEDUP, largest=True)
    facts: dict[str, Any] = {"where": where, "ranked": ranked, "sped_up": sped_up}
    facts |= {"top": None, "median": None}
    facts["error"] = error_of_text(ranked[0]) if ranked and metric.tag == BITS else None
    costs = [interval.mean for s in ranked if (interval := s.estimate(FLOPS).interval)]
    unequal = len(costs) == len(ranked) > 1 and max(costs) > 1.02 * min(costs)
    facts["flops"] = (costs[0], min(costs), max(costs)) if unequal else None
    shares = [(s, share) for s in group if (share := solved_share(s, level))]
    if settings.is_task and shares:
        # Of equal shares, the one with the most seeds has the narrowest interval.
        best, top = max(shares, key=lambda pair: (pair[1].rate, pair[1].n))
        equal = [s.name for s, share in shares if share.rate == top.rate and s is not best]
        facts |= {"best": best, "top": top, "equal": equal, "alone": len(shares) == 1}
        curves = [(s, curve) for s in group if (curve := time_to_solve(s, level))]
        medians = [(curve.median, s.name) for s, curve in curves if curve.median is not None]
        if medians and top.count:
            step, labels = min(grouped(medians).items())
            facts["median"] = {"step": step, "labels": labels, "several": len(medians) > 1}
    return facts


def _ranked(settings: Sequence[Setting], tag: str, *, largest: bool = False) -> list[Setting]:
    """Settings that have a mean of the metric, the best first."""
    means = [(interval.mean, s) for s in settings if (interval := s.estimate(tag).interval)]
    return [s for _, s in sorted(means, key=lambda pair: pair[0], reverse=largest)]


def caveats(settings: Settings) -> list[str]:
    """Sentences on what is missing and what may make numbers incomparable."""
    done = [run for run in settings.runs if run.state == "done"]
    versions = [v for run in done if isinstance(v := run.fact("versions"), dict)]
    finished = [setting for setting in settings.all if setting.done]
    gaps: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for setting in finished:
        estimates = ((setting.estimate(metric.tag), metric.tag) for metric in settings.columns)
        missing = grouped((estimate.gap, tag) for estimate, tag in estimates if estimate.gap)
        for gap, tags in missing.items():
            gaps.setdefault((gap, tuple(tags)), []).append(setting.name)
    partial_settings = [setting for setting in finished if len(setting.done) < setting.planned]
    fewer = grouped(((len(s.done), s.planned), s.name) for s in partial_settings)
    answering = [run for s in settings.all for run in s.done if settings.is_task and s.answers]
    others = [s.name for s in settings.all if settings.is_task and s.done and not s.answers]
    return _sentences(
        "caveats.jinja",
        contexts=contexts(settings.all),
        done=done,
        notes=[
            *(note for sweep in settings.sweeps for note in sweep.notes),
            *(f"{run.name}: {note}." for run in settings.runs for note in run.notes),
        ],
        left_out=settings.left_out,
        data=len({json.dumps(run.fact("data", "fingerprint")) for run in done}),
        tokenizers=len({json.dumps(run.fact("data", "tokenizer", "fingerprint")) for run in done}),
        kinds=partial(_kinds, done),
        packages=sorted({name for v in versions for name in v}),
        task_others=others,
        silent=[run.name for run in answering if wait_of(run, settings.level) is None],
        settings=settings.all,
        gaps=gaps,
        partial=fewer,
        # The intervals of shares are not Student's.
        pairs=[s.name for s in settings.all if len(s.done) == 2 and not settings.is_task],
        absent=[run.name for run in done if not any("progress/tokens" in row for row in run.rows)],
    )


def _kinds(
    runs: Sequence[RunRecord], *keys: str, between: str = "; ", cut: int | None = None
) -> str:
    """The values of a fact with their numbers of runs; empty if all runs have the same value."""
    values = (run.fact(*keys) for run in runs)
    kinds = Counter("unknown" if v is None else json.dumps(v).strip('"') for v in values)
    text = between.join(f"{kind[:cut]} ({n})" for kind, n in kinds.most_common(4))
    return text if len(kinds) > 1 else ""

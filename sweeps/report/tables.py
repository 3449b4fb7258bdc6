"""The tables of a page as data: the text and the sort key of every cell."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mtp_lightning.run.layout import LOG_FILE
from mtp_lightning.run.solved import EXACT
from sweeps.report.comparable import error_of_text
from sweeps.report.compare import Comparison, solved_share, time_to_solve
from sweeps.report.equivalent import Family
from sweeps.report.metrics import BITS, STEPS, Metric, number, p_value, spread
from sweeps.report.names import texts
from sweeps.report.read import RunRecord
from sweeps.report.settings import Settings, lacks, show
from sweeps.report.statistics import Interval


@dataclass(frozen=True)
class TableCell:
    """One cell: its text and what stands around it."""

    text: str
    sort: str | None = None  # a number to the last bit; None to sort by the text
    half: str = ""  # an interval after the text
    beside: str = ""  # a line below the text
    gap: str = ""  # a line below that says why there is no number
    kind: str = ""  # CSS classes; ``text`` aligns to the left
    link: str = ""  # the path of a log, linked after the text


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it."""

    name: str  # its id in the page
    title: str
    caption: list[str]  # paragraphs
    head: list[tuple[str, str | None]]  # (name, unit) of a column; None for one of text
    rows: list[list[TableCell]] = field(default_factory=list)


def of_settings(settings: Settings, remarks: Sequence[str]) -> Table:
    """The final numbers of every setting."""
    metrics = _metrics(settings)
    solving = [("Solved", "of seeds"), ("Median time", "steps to solve")] * settings.is_task
    table = _table("settings", remarks)
    table.head.extend((key, None) for key in settings.varied or ["Setting"])
    table.head.extend([("Seeds", "done of planned"), *solving])
    table.head.extend((metric.name, metric.unit) for metric in metrics)
    for setting in settings.all:
        values = ["–" if lacks(k, v) else show(v) for k, v in setting.values.items()]
        keys = [_text(value) for value in values or ["all runs"]]
        done, planned = len(setting.done), setting.planned
        seeds = f"{done} of {planned}" if done < planned else str(done)
        cells = [*keys, TableCell(seeds, str(done), kind="some" * (done < planned))]
        if settings.is_task:
            share = solved_share(setting, settings.level)
            curve = time_to_solve(setting, settings.level)
            median = curve.median if curve else None
            late = f"not by step {curve.times[-1]:,.0f}" if curve and median is None else ""
            counts = f"{share.count} of {share.n}: {spread(share.interval, '%')}" if share else ""
            gap = setting.estimate(EXACT).gap
            rate = None if share is None else share.rate
            cells.append(_number(rate, "%", beside=counts, gap=gap))
            cells.append(_number(median, 0, beside=late))
        for metric in metrics:
            estimate = setting.estimate(metric.tag)
            error = error_of_text(setting) if metric.tag == BITS else None
            beside = "" if error is None else f"text: s.e. {metric.show(error)}"
            cells.append(_interval(estimate.interval, metric.form, beside=beside, gap=estimate.gap))
        table.rows.append(cells)
    return table


def _metrics(settings: Settings) -> list[Metric]:
    """The columns that some run has. Bits per byte are shown only if tokenizers differ or the
    text's own error is known; otherwise they repeat the loss per token. Steps are shown if matching
    has set others than the config."""
    measured = [
        m for m in settings.columns if any(run.final(m.tag) is not None for run in settings.done)
    ]
    with_bits = settings.headline.tag == BITS or any(
        error_of_text(setting) is not None for setting in settings.all
    )
    step_counts = [(run.final(STEPS), run.config.get("trainer.max_steps")) for run in settings.done]
    visible = {BITS: with_bits, STEPS: any(done != steps for done, steps in step_counts)}
    return [metric for metric in measured if visible.get(metric.tag, True)]


def of_gains(family: Family, number: int = 0) -> Table:
    """The compute-equivalent gain of every arm."""
    plain = "; ".join(setting.name for setting in family.plain)
    table = _table("gains", name=f"gains-{number}" if number else "", plain=plain)
    for arm in family.arms:
        gain = _interval(arm.total, 3, gap=arm.why)
        factors = [_interval(part, 3) for part in (arm.price, arm.effect)]
        table.rows.append([_text(arm.setting.label), TableCell(str(arm.n)), gain, *factors])
    return table


def of_floors(settings: Settings) -> Table:
    """How often drafts are rejected, and how much of that no head could avoid; without rows if no
    run measured it."""
    table = _table("floors")
    for setting in settings.all:
        tags = {tag for run in setting.done for tag in run.summary}
        places = (re.fullmatch(r"val/floor_depth_(\d+)_order_(\d+)", tag) for tag in tags)
        for k, m in sorted((int(place[1]), int(place[2])) for place in places if place):
            row = [_text(setting.label), TableCell(str(k)), TableCell(str(m))]
            order = f"depth_{k}_order_{m}"
            stems = f"rejection_depth_{k} floor_{order} gap_{order} recall_16_depth_{k}"
            for stem in stems.split():
                estimate = setting.estimate(f"val/{stem}")
                row.append(_interval(estimate.interval, "%", gap=estimate.gap))
            table.rows.append(row)
    return table


def of_differences(
    comparisons: Sequence[Comparison], settings: Settings, remarks: Sequence[str]
) -> Table:
    """Every setting compared with its reference."""
    table = _table(
        "differences_of_task" if settings.is_task else "differences",
        remarks,
        name="differences",
        level=f"{settings.level:g}",
        unit=settings.headline.unit,
    )
    for c in comparisons:
        if settings.is_task:
            shares = [c.solved.own, c.solved.other] if c.solved else []
            numbers = [
                TableCell(f"{x.count} of {x.n}", repr(x.rate), beside=spread(x.interval, "%"))
                for x in shares
            ] or 2 * [TableCell("–", "")]
        else:
            difference = c.paired.difference if c.paired else None
            mean = _interval(difference, 4)
            if c.paired and c.paired.constant:
                mean = replace(mean, half="")
            numbers = [TableCell(str(difference.n) if difference else "0"), mean]
        ps = [
            TableCell(p_value(p), "" if p is None else repr(p))
            for p in (c.result.p if c.result else None, c.adjusted)
        ]
        outcome = TableCell(c.verdict, kind="text beyond" if c.differs else "text")
        table.rows.append([_text(c.setting.label), _text(c.against.label), *numbers, *ps, outcome])
    return table


def of_jobs(runs: Sequence[RunRecord], folder: Path) -> Table:
    """Jobs that are not done, ten pending ones at most, with the overrides that not all jobs share;
    links to logs are relative to the page's ``folder``."""
    table = _table("jobs")
    shared = set.intersection(*(set(run.overrides.items()) for run in runs)) if runs[1:] else set()
    pending = [run for run in runs if run.state == "pending"]
    for run in runs:
        if run.state == "done" or run in pending[10:]:
            continue
        log = run.folder / LOG_FILE
        steps = [row["step"] for row in run.rows if math.isfinite(row.get("step", math.nan))]
        # Quoting prevents that a name is read as a scheme or a query.
        link = quote(os.path.relpath(log, folder)) if log.is_file() else ""
        overrides = " ".join(f"{k}={v}" for k, v in run.overrides.items() if (k, v) not in shared)
        table.rows.append(
            [
                _text(run.name),
                TableCell(run.state, kind="text state"),
                TableCell(str(int(max(steps))) if steps else ""),
                TableCell(run.reason, kind="text wrap", link=link),
                TableCell(overrides, kind="text wrap code"),
            ]
        )
    return table


def _table(kind: str, remarks: Sequence[str] = (), *, name: str = "", **values: Any) -> Table:
    """A table without rows, with the words of ``texts.yaml`` and further paragraphs."""
    words = texts("tables")[kind]
    caption = [words["caption"].format(**values)] if "caption" in words else []
    columns = (
        (c, None) if isinstance(c, str) else (c[0], c[1].format(**values)) for c in words["head"]
    )
    return Table(name or kind, words["title"], [*caption, *remarks], list(columns))


def _text(text: str) -> TableCell:
    return TableCell(text, kind="text")


def _number(value: float | None, form: str | int, *, beside: str = "", gap: str = "") -> TableCell:
    """A number in its form; a dash for None."""
    text, sort = ("–", "") if value is None else (number(value, form), repr(value))
    return TableCell(text, sort, beside=beside, gap=gap)


def _interval(
    interval: Interval | None, form: str | int, *, beside: str = "", gap: str = ""
) -> TableCell:
    cell = _number(interval.mean if interval else None, form, beside=beside, gap=gap)
    return replace(cell, half=spread(interval, form)) if interval and interval.half else cell

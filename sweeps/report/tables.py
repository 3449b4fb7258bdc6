"""The tables of a page as data: the text and the sort key of every cell."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from mtp_lightning.run.layout import LOG_FILE
from sweeps.report.comparable import error_of_text
from sweeps.report.compare import Comparison, solved_share, time_to_solve
from sweeps.report.equivalent import Family
from sweeps.report.metrics import BITS, EXACT, Metric, ends, number, p_value, spread
from sweeps.report.read import RunRecord
from sweeps.report.settings import Settings, show
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
    table = Table(
        "settings",
        "Settings",
        [
            "Final validation, mean over seeds with the 95 % interval: ± half its width, or both "
            "ends for a share. A dash means that there is no number. Click a header to sort.",
            *remarks,
        ],
        [
            *((key, None) for key in settings.varied or ["Setting"]),
            ("Seeds", "done of planned"),
            *solving,
            *((metric.name, metric.unit) for metric in metrics),
        ],
    )
    for setting in settings.all:
        keys = [_text(show(value)) for value in setting.values.values()] or [_text("all runs")]
        done, planned = len(setting.done), setting.planned
        seeds = f"{done} of {planned}" if done < planned else str(done)
        cells = [*keys, TableCell(seeds, str(done), kind="some" * (done < planned))]
        if settings.is_task:
            share = solved_share(setting, settings.level)
            curve = time_to_solve(setting, settings.level)
            median = curve.median if curve else None
            late = f"not by step {curve.times[-1]:,.0f}" if curve and median is None else ""
            counts = f"{share.count} of {share.n}: {ends(share)}" if share else ""
            gap = setting.estimate(EXACT).gap
            rate = None if share is None else share.rate
            cells.append(_number(rate, "%", beside=counts, gap=gap))
            cells.append(_number(median, 0, beside=late))
        for metric in metrics:
            found = setting.estimate(metric.tag)
            error = error_of_text(setting) if metric.tag == BITS else None
            beside = "" if error is None else f"text: s.e. {metric.show(error)}"
            cells.append(_interval(found.interval, metric.form, beside=beside, gap=found.gap))
        table.rows.append(cells)
    return table


def _metrics(settings: Settings) -> list[Metric]:
    """The columns that some run has. Bits per byte are shown only if tokenizers differ or the
    text's own error is known; otherwise they repeat the loss per token."""
    found = [
        m for m in settings.columns if any(run.final(m.tag) is not None for run in settings.done)
    ]
    wanted = settings.headline.tag == BITS or any(
        error_of_text(setting) is not None for setting in settings.all
    )
    return [m for m in found if m.tag != BITS or wanted]


def of_gains(family: Family, number: int = 0) -> Table:
    """The compute-equivalent gain of every arm."""
    table = Table(
        f"gains-{number}" if number else "gains",
        "Compute-equivalent gain",
        [
            "FLOPs of plain training that reaches the arm's loss, divided by the arm's own: 1 pays "
            "for itself, more is better. The gain is price × effect: the price is the FLOPs of a "
            "plain step divided by those of the arm's, the effect is what a step of the arm is "
            "worth in plain steps. Geometric means over seeds with 95 % intervals (t, of "
            "logarithms), each seed against its own plain runs: "
            f"{', '.join(setting.label for setting in family.plain)}. Between these log FLOPs are "
            "interpolated over the loss by a monotone cubic; a loss beyond them is out of range."
        ],
        [("Arm", None), ("Seeds", ""), ("Gain", "×"), ("Price", "×"), ("Effect", "×")],
    )
    for arm in family.arms:
        gain = _interval(arm.total, 3, gap=arm.why)
        rest = [_interval(found, 3) for found in (arm.price, arm.effect)]
        table.rows.append([_text(arm.setting.label), TableCell(str(len(arm.gains))), gain, *rest])
    return table


def of_floors(settings: Settings) -> Table:
    """How often drafts are rejected, and how much of that no head could avoid; without rows if no
    run measured it."""
    table = Table(
        "floors",
        "Floor and gap",
        [
            "Rejection of sampled drafts, on the model's own continuations of held-out "
            "prompts. A head of order m sees the trunk's state and the m tokens before "
            "its target: the floor is the least rejection of any such head, the gap is how "
            "far the trained head lies above it. A head that reads more tokens may be below the "
            "floor of a small order. Recall: the target is among the head's first 16 choices."
        ],
        [
            ("Setting", None),
            ("Depth", ""),
            ("Order", ""),
            *((name, "of drafts") for name in ("Rejection", "Floor", "Gap")),
            ("Recall", "of targets"),
        ],
    )
    for setting in settings.all:
        tags = {tag for run in setting.done for tag in run.summary}
        places = (re.fullmatch(r"val/floor_depth_(\d+)_order_(\d+)", tag) for tag in tags)
        for k, m in sorted((int(place[1]), int(place[2])) for place in places if place):
            row = [_text(setting.label), TableCell(str(k)), TableCell(str(m))]
            order = f"depth_{k}_order_{m}"
            of = (f"rejection_depth_{k}", f"floor_{order}", f"gap_{order}", f"recall_16_depth_{k}")
            for name in of:
                found = setting.estimate(f"val/{name}")
                row.append(_interval(found.interval, "%", gap=found.gap))
            table.rows.append(row)
    return table


def of_differences(
    comparisons: Sequence[Comparison], settings: Settings, remarks: Sequence[str]
) -> Table:
    """Every setting compared with its reference."""
    tests = sum(c.adjusted is not None for c in comparisons)
    corrected = f"the next column has Holm's correction for the {tests} tests of this table."
    against = [("Setting", None), ("Against", None)]
    verdict = [("p, Holm", ""), ("Verdict", None)]
    if settings.is_task:
        said = (
            f"Seeds that solve (final val/exact_match above {settings.level:g}), of a setting and "
            "of its reference, with 95 % intervals (Clopper-Pearson). The p-value is that of "
            "Fisher's exact test, two-sided; it is unpaired: equal seeds of two settings count as "
            f"separate draws; {corrected}"
        )
        own = [("Solved", "by the setting"), ("Solved", "by the reference"), ("p", "Fisher")]
    else:
        said = (
            "Validation loss of the main depth: setting minus reference, paired by seed. Below 0 "
            f"is better. The p-value is the paired t-test's; {corrected}"
        )
        own = [("Pairs", ""), ("Difference", settings.headline.unit), ("p", "")]
    table = Table("differences", "Differences", [said, *remarks], [*against, *own, *verdict])
    for c in comparisons:
        if settings.is_task:
            shares = [c.solved.own, c.solved.other] if c.solved else []
            numbers = [
                TableCell(f"{x.count} of {x.n}", repr(x.rate), beside=ends(x)) for x in shares
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
        table.rows.append([_text(c.setting.label), _text(c.against), *numbers, *ps, outcome])
    return table


def of_jobs(runs: Sequence[RunRecord], folder: Path) -> Table:
    """Jobs that are not done; links to logs are relative to the page's ``folder``."""
    head = [("Job", None), ("State", None), ("Step", ""), ("Why", None), ("Overrides", None)]
    table = Table("jobs", "Jobs that are not done", [], head)
    for run in runs:
        log = run.folder / LOG_FILE
        steps = [row["step"] for row in run.rows if math.isfinite(row.get("step", math.nan))]
        # Quoting prevents that a name is read as a scheme or a query.
        link = quote(os.path.relpath(log, folder)) if log.is_file() else ""
        overrides = " ".join(f"{k}={v}" for k, v in run.overrides.items())
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


def _text(text: str) -> TableCell:
    return TableCell(text, kind="text")


def _number(value: float | None, form: str | int, *, beside: str = "", gap: str = "") -> TableCell:
    """A number in its form; a dash for None."""
    text, sort = ("–", "") if value is None else (number(value, form), repr(value))
    return TableCell(text, sort, beside=beside, gap=gap)


def _interval(
    found: Interval | None, form: str | int, *, beside: str = "", gap: str = ""
) -> TableCell:
    cell = _number(found.mean if found else None, form, beside=beside, gap=gap)
    return replace(cell, half=spread(found, form)) if found and found.half else cell

"""From settings, comparisons and drawings to `report.html`, `runs.csv` and the figures' files."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mtp_lightning.run.atomic import write_bytes
from mtp_lightning.run.layout import LOG_FILE
from sweeps.report.comparable import refusal
from sweeps.report.comparisons import Comparison
from sweeps.report.context import contexts
from sweeps.report.differing import configs
from sweeps.report.findings import answer, caveats
from sweeps.report.interactive import mark, points_of
from sweeps.report.metrics import BITS, CURVE_AXES, Metric, number, p_value, spread
from sweeps.report.read import Run, Sweep
from sweeps.report.reading import meaning
from sweeps.report.settings import Settings, show
from sweeps.report.solving import wait_of
from sweeps.report.style import Drawing, as_inline, as_png, as_svg
from sweeps.report.table_task import SOLVED_COLUMNS, solved_cells, solved_test
from sweeps.report.text_error import error_of_text, text_errors
from sweeps.report.texts import text_of

FIGURES = "figures"


def render(
    settings: Settings,
    comparisons: Sequence[Comparison],
    sweeps: Sequence[Sweep],
    drawings: Sequence[Drawing],
    svgs: dict[str, bytes],
    *,
    folder: Path,
    now: datetime,
    points: dict[str, Any] | None = None,
    every: float | None = None,
) -> str:
    """The page, complete in itself.

    Args:
        settings: of all sweeps.
        comparisons: of the main loss, or of a task's seeds that solve.
        sweeps: where the runs are.
        drawings: drawn or lacking.
        svgs: of those that are drawn, by name.
        folder: where the page goes; links to logs are relative to it.
        now: shown as the time of the report.
        points: of the figures, by name, for the page's script; None for none.
        every: seconds after which the page loads itself again; None for a page that stays.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    runs = [run for sweep in sweeps for run in sweep.runs]
    # What is said in the notes, too; whoever reads a table may not have read those.
    beside = [*filter(None, [refusal(settings.all)]), *contexts(settings.all)]
    environment = Environment(
        loader=PackageLoader("sweeps.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (
        Markup("\n".join(environment.get_template(f"{name}.jinja").render() for name in names))
        for names in (("report.css",), ("sort.js", "interactive.js", "zoom.js"))
    )
    shown = [
        {
            "name": drawing.name,
            "title": drawing.title,
            "caption": drawing.caption,
            "svg": Markup(as_inline(svgs[drawing.name], name=drawing.name, label=drawing.title)),
        }
        for drawing in drawings
        if drawing.name in svgs
    ]
    compared = configs(runs)
    data = {
        "settings": [setting.label for setting in settings.all],
        "figures": points or {},
        "curves": [f"loss_{axis}" for axis in CURVE_AXES],
        "configs": compared,
    }
    return environment.get_template("report.html.jinja").render(
        # Within a script, "<" could only end it.
        data=Markup(json.dumps(data).replace("<", "\\u003c")),
        style=style,
        script=script,
        policy=Markup(_policy(style, script)),
        every=every,
        compared=list(compared) if len(compared) > 1 else [],
        title=" and ".join(sweep.folder.resolve().name for sweep in sweeps),
        folders=[str(sweep.folder) for sweep in sweeps],
        now=now.strftime("%Y-%m-%d %H:%M"),
        running=any(run.state in ("running", "pending") for run in runs),
        answer=answer(settings, comparisons, runs),
        caveats=caveats(settings, sweeps),
        remarks=[*filter(None, [meaning(settings), text_errors(settings.all)]), *beside],
        beside=beside,
        varied=settings.varied,
        task=settings.is_task,
        level=f"{settings.level:g}",
        metrics=[*(SOLVED_COLUMNS if settings.is_task else ()), *_metrics(settings)],
        rows=_rows(settings),
        headline="Validation loss of the main depth",
        unit=settings.headline.unit,
        tests=sum(c.adjusted is not None for c in comparisons),
        comparisons=[(solved_test if settings.is_task else _comparison)(c) for c in comparisons],
        figures=shown,
        absent=[f"{d.title}: {d.why}." for d in drawings if d.why],
        jobs=[_job(run, folder) for run in runs if run.state != "done"],
    )


def _policy(style: str, script: str) -> str:
    """What the page may do: it is shown and answers by its own style and script, told by their
    digests. Whatever else of a run might get into it is not run, and nothing is loaded."""
    style, script = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src {style}; script-src {script}; "
        "base-uri 'none'; form-action 'none'"
    )


def write_figures(
    drawings: Sequence[Drawing], folder: Path, labels: Sequence[str]
) -> tuple[dict[str, bytes], list[Path], dict[str, Any]]:
    """PNG and SVG of every drawing; the SVGs by name, the PNGs' paths, and the points by name.

    Figures of an earlier report that are not drawn any more are removed.

    Args:
        drawings: drawn or lacking.
        folder: of the files.
        labels: of the settings, as the figures have them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    svgs: dict[str, bytes] = {}
    points: dict[str, Any] = {}
    pngs = []
    for drawing in drawings:
        for ending in ("png", "svg"):
            for old in folder.glob(f"{drawing.name}*.{ending}"):  # heat_map_1, too
                old.unlink()
    for drawing in drawings:
        if drawing.figure is not None:
            mark(drawing.figure, labels)
            svgs[drawing.name] = as_svg(drawing.figure)
            points[drawing.name] = points_of(drawing.figure, labels)
            write_bytes(svgs[drawing.name], folder / f"{drawing.name}.svg")
            write_bytes(as_png(drawing.figure), folder / f"{drawing.name}.png")
            pngs.append(folder / f"{drawing.name}.png")
    return svgs, pngs, points


def runs_csv(settings: Settings, sweeps: Sequence[Sweep]) -> str:
    """One row a run, finished or not: state, varied keys, seed, and every number of its summary.

    Numbers are written to the last bit, NaN as ``nan``; what does not exist is an empty cell.
    """
    runs = [run for sweep in sweeps for run in sweep.runs]
    values = {run.folder: setting.values for setting in settings.all for run in setting.runs}
    mentioned = any(map(text_of, runs))
    repeated = {run.folder for run in settings.left_out}
    tags = {
        tag: None
        for run in runs
        for tag, value in run.summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and tag != "seed"
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    # In full, so that whoever averages these rows can keep texts apart.
    texts = ["evaluated_text"] if mentioned else []
    solving = ["solved_at_step"] if settings.is_task else []
    head = ["run", "state", "reason", *settings.varied, "seed", "counted"]
    writer.writerow([*head, *texts, *solving, *tags])
    for run in runs:
        own = values.get(run.folder, {**run.overrides, "folder": run.sweep})
        writer.writerow(
            [
                run.name,
                run.state,
                run.reason,
                *(show(own[key]) if key in own else "" for key in settings.varied),
                "" if run.seed is None else run.seed,
                int(run.state == "done" and run.folder not in repeated),
                *([run.fact("evaluation", "fingerprint") or ""] if mentioned else []),
                *(_solved_at(run, settings.level) for _ in solving),
                *(repr(run.summary[tag]) if tag in run.summary else "" for tag in tags),
            ]
        )
    return buffer.getvalue()


def _solved_at(run: Run, level: float) -> str:
    """The step of the first validation above the level; empty where there is none."""
    wait = wait_of(run, level)
    return str(int(wait.time)) if wait and wait.ended else ""


def _metrics(settings: Settings) -> list[Metric]:
    """The table's columns: what some run has. Bits per byte say more than the loss per token only
    where tokenizers differ, or where the text's own error stands beside them."""
    found = [
        m for m in settings.columns if any(run.final(m.tag) is not None for run in settings.done)
    ]
    wanted = settings.headline.tag == BITS or any(
        error_of_text(setting) is not None for setting in settings.all
    )
    return [m for m in found if m.tag != BITS or wanted]


def _rows(settings: Settings) -> list[dict[str, Any]]:
    rows = []
    for setting in settings.all:
        cells = solved_cells(setting, settings.level) if settings.is_task else []
        for metric in _metrics(settings):
            found = setting.estimate(metric.tag)
            error = error_of_text(setting) if metric.tag == BITS else None
            cells.append(
                {
                    "sort": "" if found.interval is None else repr(found.interval.mean),
                    "mean": metric.show(found.interval.mean) if found.interval else "–",
                    "spread": spread(found.interval, metric.form)
                    if found.interval and found.interval.half
                    else "",
                    "gap": found.gap,
                    "beside": "" if error is None else f"text: s.e. {metric.show(error)}",
                }
            )
        rows.append(
            {
                "keys": [{"text": show(v), "sort": show(v)} for v in setting.values.values()],
                "done": len(setting.done),
                "planned": setting.planned,
                "cells": cells,
            }
        )
    return rows


def _comparison(found: Comparison) -> dict[str, Any]:
    result = found.result
    return {
        "setting": found.setting.label,
        "reference": found.against,
        "n": result.difference.n if result else 0,
        "mean": number(result.difference.mean, 4) if result else "–",
        "spread": spread(result.difference, 4) if result and not result.constant else "",
        "sort": repr(result.difference.mean) if result else "",
        "p": p_value(result.p) if result else "",
        "p_sort": repr(result.p) if result and result.p is not None else "",
        "adjusted": p_value(found.adjusted),
        "adjusted_sort": "" if found.adjusted is None else repr(found.adjusted),
        "verdict": found.verdict,
        "differs": found.differs,
    }


def _job(run: Run, folder: Path) -> dict[str, Any]:
    log = run.folder / LOG_FILE
    steps = [row["step"] for row in run.rows if math.isfinite(row.get("step", math.nan))]
    return {
        "name": run.name,
        "state": run.state,
        "step": int(max(steps)) if steps else "",
        "reason": run.reason,
        "overrides": " ".join(f"{k}={v}" for k, v in run.overrides.items()),
        # Quoted, no part of a name is a scheme or begins a query.
        "log": quote(os.path.relpath(log, folder)) if log.is_file() else "",
    }

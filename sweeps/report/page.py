"""From settings, comparisons and drawings to `report.html`, `runs.csv` and the figures' files."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mtp_lightning.run.atomic import write_bytes
from sweeps.report import tables
from sweeps.report.comparable import contexts, meaning, refusal, text_errors
from sweeps.report.compare import Comparison, wait_of
from sweeps.report.differing import configs
from sweeps.report.equivalent import Family
from sweeps.report.findings import answer, caveats
from sweeps.report.hover import Point, mark, points_of
from sweeps.report.names import joined, question
from sweeps.report.read import Sweep
from sweeps.report.settings import Settings, show
from sweeps.report.style import Drawing, as_inline, as_png, as_svg
from sweeps.report.templates import environment

FIGURES = "figures"


def render(
    settings: Settings,
    comparisons: Sequence[Comparison],
    families: Sequence[Family],
    sweeps: Sequence[Sweep],
    drawings: Sequence[Drawing],
    svgs: dict[str, tuple[bytes, list[Point]]],
    *,
    folder: Path,
    now: datetime,
    every: float | None = None,
) -> str:
    """The page, complete in itself.

    Args:
        settings: of all sweeps.
        comparisons: of the main loss, or of a task's seeds that solve.
        families: plain curves with the arms that they price.
        sweeps: where the runs are.
        drawings: drawn or lacking.
        svgs: of those that are drawn, by name, with their points.
        folder: where the page goes; links to logs are relative to it.
        now: shown as the time of the report.
        every: seconds after which the page loads itself again; None for a page that stays.
    """
    from markupsafe import Markup

    runs = [run for sweep in sweeps for run in sweep.runs]
    # What is said in the notes, too; whoever reads a table may not have read those.
    beside = [*filter(None, [refusal(settings.all)]), *contexts(settings.all)]
    remarks = [*filter(None, [meaning(settings), text_errors(settings.all)]), *beside]
    made = environment("sweeps.report", html=True)
    style, script = (
        Markup("\n".join(made.get_template(f"{name}.jinja").render() for name in names))
        for names in (("report.css",), ("sort.js", "page.js"))
    )
    figures = []
    for drawing in (d for d in drawings if d.name in svgs):
        svg, points = svgs[drawing.name]
        inline = as_inline(svg, name=drawing.name, label=drawing.title, points=points)
        figures.append({"drawing": drawing, "svg": Markup(inline)})
    compared = configs(runs)
    data = {"settings": [setting.name for setting in settings.all], "configs": compared}
    not_done = [run for run in runs if run.state != "done"]
    return made.get_template("report.html.jinja").render(
        # Within a script, "<" could only end it.
        data=Markup(json.dumps(data).replace("<", "\\u003c")),
        style=style,
        script=script,
        policy=Markup(_policy(style, script)),
        every=every,
        compared=list(compared) if len(compared) > 1 else [],
        title=question(settings.varied, settings.headline, task=settings.is_task)
        or joined([sweep.folder.resolve().name for sweep in sweeps]),
        command=shlex.join(["mtp-lightning", "report", *(str(sweep.folder) for sweep in sweeps)]),
        commits=sorted({commit[:8] for run in runs if (commit := run.fact("git_commit"))}),
        now=now.strftime("%Y-%m-%d %H:%M"),
        running=any(run.state in ("running", "pending") for run in runs),
        answer=answer(settings, comparisons, runs, families),
        caveats=caveats(settings, sweeps),
        tables=[
            tables.of_settings(settings, remarks),
            *(tables.of_gains(family, settings, i) for i, family in enumerate(families)),
            *filter(None, [tables.of_floors(settings)]),
            tables.of_differences(comparisons, settings, beside),
        ],
        jobs=tables.of_jobs(not_done, folder),
        task=settings.is_task,
        level=f"{settings.level:g}",
        figures=figures,
        absent=[f"{d.title}: {d.why}." for d in drawings if d.why],
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
) -> dict[str, tuple[bytes, list[Point]]]:
    """PNG and SVG of every drawing; by name, the SVGs and their points.

    Figures of an earlier report that are not drawn any more are removed.

    Args:
        drawings: drawn or lacking.
        folder: of the files.
        labels: of the settings, as the figures have them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for drawing in drawings:
        for ending in ("png", "svg"):
            for old in folder.glob(f"{drawing.name}*.{ending}"):  # heat_map_1, too
                old.unlink()
    svgs: dict[str, tuple[bytes, list[Point]]] = {}
    for drawing in drawings:
        if drawing.figure is not None:
            mark(drawing.figure, labels)
            svg = as_svg(drawing.figure)
            svgs[drawing.name] = svg, points_of(drawing.figure, labels)
            write_bytes(svg, folder / f"{drawing.name}.svg")
            write_bytes(as_png(drawing.figure), folder / f"{drawing.name}.png")
    return svgs


def runs_csv(settings: Settings, sweeps: Sequence[Sweep]) -> str:
    """One row a run, finished or not: state, varied keys, seed, and every number of its summary.

    Numbers are written to the last bit, NaN as ``nan``; what does not exist is an empty cell.
    """
    runs = [run for sweep in sweeps for run in sweep.runs]
    values = {run.folder: setting.values for setting in settings.all for run in setting.runs}
    repeated = {run.folder for run in settings.left_out}
    # In full, so that whoever averages these rows can keep texts apart.
    text = ["evaluated_text"] * any(run.text for run in runs)
    solving = ["solved_at_step"] * settings.is_task
    names = ["run", "state", "reason", *settings.varied, "seed", "counted", *text, *solving]
    rows: list[dict[str, Any]] = []
    for run in runs:
        own = values.get(run.folder, {**run.overrides, "folder": run.sweep})
        wait = wait_of(run, settings.level) if solving else None
        row: dict[str, Any] = {key: show(own[key]) for key in settings.varied if key in own}
        row |= {"run": run.name, "state": run.state, "reason": run.reason, "seed": run.seed}
        row["counted"] = int(run.state == "done" and run.folder not in repeated)
        row |= dict.fromkeys(text, run.fact("evaluation", "fingerprint"))
        row |= dict.fromkeys(solving, int(wait.time) if wait and wait.ended else "")
        row |= {k: repr(v) for k, v in run.summary.items() if k not in row and _is_number(v)}
        rows.append(row)
    buffer = io.StringIO()
    names = list(dict.fromkeys([*names, *(key for row in rows for key in row)]))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

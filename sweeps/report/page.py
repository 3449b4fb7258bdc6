"""Writes `report.html`, `runs.csv`, the figures' files and those of TensorBoard."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shlex
import struct
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.run.atomic import write_bytes
from mtp_lightning.run.config import PLACES, lies_in
from sweeps.report import environment, tables
from sweeps.report.collect import FOLDER
from sweeps.report.comparable import contexts, note_on_depths, refusal, text_errors
from sweeps.report.compare import Comparison, wait_of
from sweeps.report.drawing import Drawing, as_inline
from sweeps.report.equivalent import Family
from sweeps.report.findings import caveats
from sweeps.report.metrics import TABLE
from sweeps.report.names import RUN, joined, question, sentence
from sweeps.report.read import RunRecord, read_sweep
from sweeps.report.settings import Settings, is_number, show

FIGURES = "figures"
_EVENTS = ".report"  # the suffix of the report's event file
# Short names of a summary, and the tags under which these values are logged.
_TAGS = {"flops": "progress/flops", "seconds": "progress/seconds"}


def render(
    settings: Settings,
    comparisons: Sequence[Comparison],
    families: Sequence[Family],
    drawings: Sequence[Drawing],
    svgs: dict[str, bytes],
    *,
    sentences: Sequence[str],
    command: Sequence[str],
    folder: Path,
    reload_seconds: float | None = None,
) -> str:
    """The page as HTML that loads nothing else.

    Drawings without a figure are listed with the reason; ``svgs`` has those of the others, by name.
    Links to logs are relative to the page's ``folder``. The page shows the current time, and the
    ``command`` that makes it again. It reloads itself after ``reload_seconds``; None for a static
    page.
    """
    from markupsafe import Markup

    runs, sweeps = settings.runs, settings.sweeps
    # The caveats say this, too, but readers of a table may not have read them.
    unequal = contexts(settings.all)
    other_data = refusal(settings.all) and sentence("other_data")
    remarks = [note_on_depths(settings), text_errors(settings.all), other_data, *unequal]
    jinja = environment("sweeps.report", html=True)
    style, script = (
        Markup(jinja.get_template(f"{name}.jinja").render()) for name in ("report.css", "page.js")
    )
    figures = [
        {"drawing": drawing, "svg": Markup(as_inline(svgs[drawing.name], drawing))}
        for drawing in drawings
        if drawing.name in svgs
    ]
    by_run = configs(runs)
    labels = {r.name: f"{s.name}, seed {r.seed}" for s in settings.all for r in s.runs}
    # Runs that belong to no setting come last.
    options = {name: labels.get(name, name) for name in [*labels, *by_run] if name in by_run}
    data = {"settings": [setting.name for setting in settings.all], "configs": by_run}
    return jinja.get_template("report.html.jinja").render(
        # A "<" could end the script element.
        data=Markup(json.dumps(data).replace("<", "\\u003c")),
        style=style,
        script=script,
        policy=Markup(_policy(style, script)),
        reload_seconds=reload_seconds,
        compared=list(options.items()) if len(options) > 1 else [],
        title=question(settings.varied, settings.headline, task=settings.is_task)
        or joined([sweep.folder.resolve().name for sweep in sweeps]),
        command=shlex.join(command),
        commits=sorted({str(commit)[:8] for run in runs if (commit := run.fact("git_commit"))}),
        now=datetime.now().strftime("%Y-%m-%d %H:%M"),
        answer=sentences,
        caveats=caveats(settings),
        tables=[
            tables.of_settings(settings, [*filter(None, remarks)]),
            *(tables.of_gains(family, i) for i, family in enumerate(families)),
            tables.of_floors(settings),
            tables.of_differences(comparisons, settings, unequal),
        ],
        jobs=tables.of_jobs(runs, folder),
        settings=settings,
        figures=figures,
        absent=[f"{d.title}: {d.why}." for d in drawings if d.why],
    )


def _policy(style: str, script: str) -> str:
    """The page's content security policy. It allows only the page's own style and script, named by
    their digests: text of a run that gets into the page is not executed, and nothing is loaded."""
    style, script = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src {style}; script-src {script}; "
        "base-uri 'none'; form-action 'none'"
    )


def write_figures(drawings: Sequence[Drawing], folder: Path) -> dict[str, bytes]:
    """Write every drawing as PNG and SVG, in place of an earlier report's; returns the SVGs, by
    name. Drawings without a figure are skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    names = "|".join(re.escape(drawing.name) for drawing in drawings)
    figure_files = re.compile(rf"({names})(_\d+)?\.(png|svg)")
    for old in folder.iterdir():
        if figure_files.fullmatch(old.name):
            old.unlink()
    svgs = {}
    for drawing in drawings:
        if drawing.chart is not None:
            svgs[drawing.name] = drawing.chart.svg()
            write_bytes(svgs[drawing.name], folder / f"{drawing.name}.svg")
            write_bytes(drawing.chart.png(), folder / f"{drawing.name}.png")
    return svgs


def write_events(folder: Path, settings: Settings, drawings: Sequence[Drawing]) -> None:
    """Replace the report's own event file.

    Without it, TensorBoard lists all keys of all command lines and all metrics. With it, the
    HPARAMS tab has the varied keys, the seed and the metrics of the report's table. The folder has
    the drawings' PNGs; TensorBoard shows its name.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for old in folder.glob(f"events.out.tfevents.*{_EVENTS}"):
        old.unlink()
    numbers = {
        key: all(is_number(setting.values.get(key)) for setting in settings.all)
        for key in settings.varied
        if key not in (FOLDER, RUN)
    }
    keys = [*numbers, *(["seed"] if "seed" not in numbers else [])]
    kinds = {True: api_pb2.DATA_TYPE_FLOAT64, False: api_pb2.DATA_TYPE_STRING}
    columns = [api_pb2.HParamInfo(name=key, type=kinds[numbers.get(key, True)]) for key in keys]
    metrics = []
    for metric in settings.columns:
        tag = api_pb2.MetricName(tag=_TAGS.get(metric.tag, metric.tag))
        metrics.append(api_pb2.MetricInfo(name=tag, display_name=f"{metric.name} ({metric.unit})"))
    content = plugin_data_pb2.HParamsPluginData(
        version=metadata.PLUGIN_DATA_VERSION,
        experiment=api_pb2.Experiment(hparam_infos=columns, metric_infos=metrics),
    )
    about = metadata.create_summary_metadata(content)
    values = [Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=about)]
    for drawing in drawings:
        if drawing.chart is not None:
            data = (folder / f"{drawing.name}.png").read_bytes()
            # A PNG's header names its size at bytes 16 to 23.
            width, height = struct.unpack(">II", data[16:24])
            image = Summary.Image(width=width, height=height, encoded_image_string=data)
            values.append(Summary.Value(tag=f"report/{drawing.title}", image=image))
    writer = EventFileWriter(str(folder), filename_suffix=_EVENTS)
    for value in values:
        writer.add_event(Event(wall_time=time.time(), summary=Summary(value=[value])))
    writer.close()


def runs_csv(settings: Settings) -> str:
    """One row per run, finished or not: state, varied keys, seed, and every number of its summary.

    Numbers are written to the last bit, NaN as ``nan``, missing values as empty cells.
    """
    values = {run.folder: setting.values for setting in settings.all for run in setting.runs}
    repeated = {run.folder for run in settings.left_out}
    # The full fingerprint: who averages these rows must keep different texts apart.
    text = ["evaluated_text"] * any(run.summary for run in settings.runs)
    solving = ["solved_at_step"] * settings.is_task
    names = ["run", "state", "reason", *settings.varied, "seed", "counted", *text, *solving]
    rows: list[dict[str, Any]] = []
    for run in settings.runs:
        by_key = values.get(run.folder, {**run.overrides, FOLDER: run.sweep})
        wait = wait_of(run, settings.level) if solving else None
        row: dict[str, Any] = {key: show(by_key[key]) for key in settings.varied if key in by_key}
        row |= {"run": run.name, "state": run.state, "reason": run.reason, "seed": run.seed}
        row["counted"] = int(run.state == "done" and run.folder not in repeated)
        row |= dict.fromkeys(text, run.fact("evaluation", "fingerprint"))
        row |= dict.fromkeys(solving, int(wait.time) if wait and wait.ended else "")
        row |= {k: repr(v) for k, v in run.summary.items() if k not in row and is_number(v)}
        rows.append(row)
    buffer = io.StringIO()
    names = list(dict.fromkeys([*names, *(key for row in rows for key in row)]))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def configs(runs: Sequence[RunRecord]) -> dict[str, dict[str, str]]:
    """Every run's values of the keys in which any two runs differ, by run; paths and runs without a
    config are left out."""
    by_run = {run.name: _typed_config(run) for run in runs if run.config}
    keys = {key for config in by_run.values() for key in config}
    varied = sorted(k for k in keys if len({config.get(k) for config in by_run.values()}) > 1)
    return {name: {k: config[k] for k in varied if k in config} for name, config in by_run.items()}


def _typed_config(run: RunRecord) -> dict[str, str]:
    """A run's config as it would be typed, without paths: those of the run's own files follow from
    its folder."""
    folder = run.config.get("paths.output_dir") or run.folder
    return {
        k: show(v)
        for k, v in run.config.items()
        if not lies_in(k, (*PLACES, "stack"))
        and not (isinstance(v, str) and Path(v).is_relative_to(folder))
    }


def differences(folders: Sequence[str | Path]) -> list[str]:
    """One line per key in which two runs differ: ``KEY: A | B``. Then the two runs' numbers, those
    of the table of settings, if both runs are finished.

    Raises:
        UserError: these are not two folders, or a folder is not that of one run with a config.
    """
    if len(folders) != 2:
        raise UserError(f"--diff compares two runs, not {len(folders)}: give two folders.")
    pair: list[RunRecord] = []
    for folder in folders:
        runs = read_sweep(folder).runs
        if len(runs) != 1 or not runs[0].config:
            raise UserError(
                f"{folder} is not a run with a config.yaml: --diff compares the folders of two "
                "runs."
            )
        pair.append(runs[0])
    left, right = map(_typed_config, pair)
    keys = sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))
    lines = [f"{key}: {left.get(key, '–')} | {right.get(key, '–')}" for key in keys]
    a, b = (run.summary for run in pair)
    metrics = (m for m in TABLE if is_number(a.get(m.tag)) and is_number(b.get(m.tag)))
    numbers = [f"{m.tag}: {m.show(a[m.tag])} | {m.show(b[m.tag])}" for m in metrics]
    return [*(lines or ["the configs are equal"]), *numbers]

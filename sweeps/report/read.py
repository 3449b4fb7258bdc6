"""Reads the files of runs, finished or not, into plain records; no file is trusted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtp_lightning.command_line.conf_comments import value_at
from mtp_lightning.errors import UserError
from mtp_lightning.run.config import LATER, flatten, read_yaml, values_by_key
from mtp_lightning.run.layout import (
    CONFIG_FILE,
    METRICS_FILE,
    STATUS_FILE,
    SUMMARY_FILE,
    SWEEP_FILE,
)
from mtp_lightning.run.metrics import read_metrics
from mtp_lightning.run.status import read_status
from mtp_lightning.stored import read_json
from sweeps.lease import look_at
from sweeps.plan import SweepPlan, varied_keys
from sweeps.process import SILENT_SECONDS, silence

_RUN_FILES = (CONFIG_FILE, STATUS_FILE, SUMMARY_FILE, METRICS_FILE)

STATES = ("done", "running", "pending", "interrupted", "failed", "missing", "unfinished")


@dataclass(frozen=True)
class EvaluatedText:
    """The validation documents of a run's final numbers; different texts do not compare."""

    # Hex digest of the documents; None if only a part of them was evaluated, or an unknown part.
    fingerprint: str | None
    documents: int | None  # number of documents; None if unknown, like the other counts
    # UTF-8 bytes of the evaluated depth-0 targets. A document mask leaves out every document's
    # first token, so runs on one text may differ in it a little.
    bytes: int | None
    tokens: int | None  # number of evaluated depth-0 targets

    @property
    def short(self) -> str:
        """A short name: eight characters of the digest, or the number of bytes."""
        if self.fingerprint:
            return self.fingerprint[:8]
        return "unknown" if self.bytes is None else f"unknown ({self.bytes:,} bytes)"

    @property
    def same(self) -> Any:
        """A value that is equal for two runs *of one setting* on one text. Without a digest it is
        the counts, since equal configs on equal data evaluate the same part."""
        return self.fingerprint or (self.documents, self.bytes, self.tokens)


@dataclass(kw_only=True)
class RunRecord:
    """One job of a sweep, or one run of a plain folder."""

    folder: Path  # the folder of its files; it may not exist
    sweep: str = ""  # the name of its sweep if there are several, else empty
    # One of `STATES`; `missing` has no files, `unfinished` has no summary and no known reason.
    state: str = "unfinished"
    reason: str = ""  # why it is not done
    # The command line's overrides by key, values as text.
    overrides: dict[str, str] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)  # the chosen options by config group
    # The composed config by dotted key; empty if it was not written.
    config: dict[str, Any] = field(default_factory=dict)
    # The final numbers and facts; empty unless done.
    summary: dict[str, Any] = field(default_factory=dict)
    # The rows of `metrics.csv`, by log tag.
    rows: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # problems with its files

    @property
    def name(self) -> str:
        """The folder's name, after the sweep's name if there are several."""
        return f"{self.sweep}/{self.folder.name}" if self.sweep else self.folder.name

    @property
    def seed(self) -> Any:
        """The config's seed, or that of the overrides before the run has begun; None if unknown."""
        value = self.config.get("seed", self.overrides.get("seed"))
        if isinstance(value, str) and value.isdecimal() and len(value) < 20:
            return int(value)
        return str(value) if isinstance(value, list) else value

    def final(self, tag: str) -> float | None:
        """A number of a finished run's summary, which may be NaN; None if it has none."""
        value = self.summary.get(tag)
        try:
            return float(value) if isinstance(value, int | float) else None
        except OverflowError:  # a whole number beyond floats
            return None

    def fact(self, *keys: str) -> Any:
        """A finished run's value under nested keys of its summary; None if there is none."""
        return value_at(self.summary, ".".join(keys))

    @property
    def text(self) -> EvaluatedText:
        """The text that a finished run was evaluated on."""
        names = ("fingerprint", "documents", "bytes", "tokens")
        digest, *counts = (self.fact("evaluation", name) for name in names)
        return EvaluatedText(
            digest if isinstance(digest, str) and digest else None,
            *(count if isinstance(count, int) else None for count in counts),
        )


@dataclass(kw_only=True)
class SweepRecord:
    """The runs of one folder."""

    folder: Path  # the folder as given
    runs: list[RunRecord]  # the sweep's jobs in its order, then other runs by name
    # The keys in which the sweep's jobs differ; empty for a plain folder.
    varied: list[str] = field(default_factory=list)
    # Problems that readers of its numbers should know.
    notes: list[str] = field(default_factory=list)


def read_sweep(folder: str | Path, *, name: str = "") -> SweepRecord:
    """Read all runs directly below a folder, or the folder itself if it is a run. A ``name`` is put
    before its runs' names.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: give a sweep's, or one with runs.")
    sweep = SweepRecord(folder=folder, runs=[])
    jobs: dict[str, tuple[str, ...]] = {}
    try:
        jobs = {job.folder: job.overrides for job in SweepPlan(folder).jobs}
    except (OSError, UserError):
        sweep.notes.append(f"{SWEEP_FILE} is damaged: jobs that have not begun are unknown.")
    sweep.varied = varied_keys(list(jobs.values()))
    leases, newest = look_at(folder)

    def read(path: Path) -> RunRecord:
        run = read_run(path, sweep=name)
        if run.state == "running" and leases.lost(path, newest.get(path.name)):
            run.state, run.reason = "interrupted", "its process is gone"
        return run

    # Names that begin with a dot are folders of a run, such as .hydra.
    inside = [path for path in sorted(folder.iterdir(), key=_natural) if path.name[0] != "."]
    run_names = [path.name for path in inside if _is_run(path)]
    for run_name in [*jobs, *(n for n in run_names if n not in jobs)]:
        run = read(folder / run_name)
        run.overrides = _overrides(jobs.get(run_name)) or run.overrides
        sweep.runs.append(run)
    if not sweep.runs and _is_run(folder):
        sweep.runs.append(read(folder))
    inner = [path.name for path in sorted(folder.iterdir()) if (path / SWEEP_FILE).is_file()]
    if not sweep.runs:
        raise FileNotFoundError(
            f"{folder} holds sweeps, not runs: give one of them, as {folder / inner[0]}."
            if inner
            else f"{folder} holds no runs: give the folder of a sweep, whose subfolders have a "
            f"{CONFIG_FILE}."
        )
    if inner:
        sweep.notes.append(f"Sweeps in subfolders are left out: {', '.join(inner)}.")
    return sweep


def read_run(folder: Path, *, sweep: str = "") -> RunRecord:
    """Read a run from those of its files that exist and are readable."""
    run = RunRecord(folder=folder, sweep=sweep)
    if not folder.is_dir():
        run.state, run.reason = "missing", "its folder does not exist: it has not begun"
        return run
    config = _content(read_yaml, folder / CONFIG_FILE)
    if isinstance(config, dict):
        run.config = LATER | flatten(config)
    elif (folder / CONFIG_FILE).exists():
        run.notes.append(f"{CONFIG_FILE} is damaged")
    hydra = _content(read_yaml, folder / ".hydra" / "hydra.yaml")
    choices = value_at(hydra, "hydra.runtime.choices")
    run.choices = choices if isinstance(choices, dict) else {}
    with suppress(OSError):  # nothing logged yet
        run.rows = read_metrics(folder / METRICS_FILE)
    status = read_status(folder)
    if not status and (folder / STATUS_FILE).exists():
        run.notes.append(f"{STATUS_FILE} is damaged")
    run.overrides = _overrides(status.get("overrides")) or _overrides(
        _content(read_yaml, folder / ".hydra" / "overrides.yaml")
    )
    state = status.get("state")
    run.reason = str(status.get("reason") or "")
    if state is not None and state != "done":
        run.state = state
        if state == "running" and not run.reason and (seconds := silence(folder)) > SILENT_SECONDS:
            run.reason = f"nothing written for {seconds / 60:.0f} minutes: is it alive?"
        return run
    file = folder / SUMMARY_FILE
    content = _content(read_json, file)
    summary = content if isinstance(content, dict) else {}
    steps, max_steps = summary.get("step"), run.config.get("trainer.max_steps")
    # Matching sets the number of steps itself, and a callback may have stopped the run early.
    may_differ = "compare" in summary or summary.get("stopped_early")
    if summary is not content:
        problem = "damaged" if file.exists() else "missing"
        well = ", though its job ended well" if state else ""
        run.reason = f"{SUMMARY_FILE} is {problem}{well}"
    elif not run.config:
        run.reason = f"its {CONFIG_FILE} is missing or damaged"
    elif steps != max_steps and not may_differ:
        run.reason = f"its {SUMMARY_FILE} is of step {steps}, its config asks for {max_steps}"
    else:
        run.state = "done"
        if changed := summary.get("changed"):
            listed = "; ".join(map(str, changed)) if isinstance(changed, list) else str(changed)
            run.notes.append(f"it continued with other settings {listed}")
        # A log tag has a number: null stands for one that is not finite.
        run.summary = {k: math.nan if v is None and "/" in k else v for k, v in summary.items()}
    return run


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in _RUN_FILES)


def _natural(path: Path) -> list[tuple[int, float, str]]:
    """A sort key that puts depth-10 after depth-2."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _content(read: Callable[[Path], Any], file: Path) -> Any:
    """The content of a file; None if it is missing or damaged."""
    try:
        return read(file)
    except (OSError, ValueError):
        return None


def _overrides(overrides: Any) -> dict[str, str]:
    """Overrides by key, without Hydra's leading ``+``."""
    if not isinstance(overrides, list | tuple):
        return {}
    return values_by_key(str(o) for o in overrides if "=" in str(o) and str(o)[:1] != "~")

"""Shows a sweep while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mtp_lightning.command_line.shell import has_styles
from mtp_lightning.run.layout import LOG_FILE, METRICS_FILE
from mtp_lightning.run.metrics import read_newest
from mtp_lightning.run.status import read_status
from sweeps.process import Job

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_MOST_ENDED = 6  # most rows of ended jobs in the live table


@dataclass
class Watched:
    """A running job and its progress, from which its speed is estimated."""

    job: Job
    device: str
    step: int = 0  # optimizer steps done
    loss: str = ""  # at that step
    first: tuple[float, int] | None = None  # time of the first look with steps, and their number
    began: float = field(default_factory=lambda: time.monotonic())

    def look(self) -> None:
        self.step, self.loss = newest(self.job.folder)
        if self.first is None and self.step:
            self.first = (time.monotonic(), self.step)

    @property
    def steps(self) -> str:
        return f"{self.step}/{self.job.max_steps}" if self.job.max_steps else str(self.step)

    def left(self, typical: float = math.nan) -> float:
        """Seconds that the remaining steps take at the speed seen so far. Before one is seen, the
        rest of a job's ``typical`` seconds, which may be NaN."""
        since, step = self.first or (0.0, self.step)
        if not self.job.max_steps or self.step <= step:
            return max(typical - (time.monotonic() - self.began), 0.0)
        rate = (self.step - step) / (time.monotonic() - since)
        return max(0, self.job.max_steps - self.step) / rate


@dataclass
class Display:
    """The state of the jobs, as a pool reports it: one line for every start and end, and now and
    then one for each running job."""

    total: int  # number of jobs that had not ended when this process began
    seconds: float = 30.0  # between two looks at the running jobs
    running: dict[Job, Watched] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)  # of ended jobs, by state
    estimates: bool = True  # whether all these jobs run here, so that the time left is known
    # Counts the jobs that have not ended where other processes end some, too; None elsewhere.
    count_left: Callable[[], int] | None = None
    seconds_done: list[float] = field(default_factory=list)  # of every job that is done
    began: float = field(default_factory=lambda: time.monotonic())
    shown: float = field(default_factory=lambda: time.monotonic())  # time of the last look

    @property
    def n_ended(self) -> int:
        """Number of jobs that have ended, here or elsewhere."""
        return self.total - self.count_left() if self.count_left else self.counts.total()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def started(self, job: Job, device: str) -> None:
        self.running[job] = Watched(job, device)
        self.event(f"started {job.label} on {device}")

    def ended(self, job: Job) -> None:
        """Records that a job has ended; its status file says how."""
        run = self.running.pop(job, None)
        status = read_status(job.folder)  # empty: a file server may not answer for a moment
        state, reason = status.get("state", "pending"), status.get("reason")
        self.counts[state] += 1
        if run and state == "done":
            self.seconds_done.append(time.monotonic() - run.began)
        why = f": {reason} (log: {job.folder / LOG_FILE})" if reason else ""
        self.event(f"{state} {job.label} ({self.n_ended} of {self.total}){why}")

    def left(self, job: Job) -> None:
        """Says that another worker has taken a job over."""
        self.running.pop(job, None)
        self.say(f"left {job.label}: another worker has it")

    def refresh(self) -> None:
        """Shows how far the running jobs are, if the last time was long enough ago."""
        if time.monotonic() - self.shown >= self.seconds:
            self.shown = time.monotonic()
            for run in self.running.values():
                run.look()
            self.show()

    def show(self) -> None:
        for run in self.running.values():
            eta = f", {left} left" if (left := duration(run.left())) else ""
            self.say(f"  {run.job.label}: step {run.steps}, loss {run.loss or '-'}{eta}")
        self.say(f"  {self.summary()}")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def event(self, text: str) -> None:
        """Says that a job has started or ended."""
        self.say(text)

    def summary(self) -> str:
        parts = [f"{self.n_ended} of {self.total} ended", f"{len(self.running)} running"]
        parts += [f"{n} {state}" for state, n in self.counts.items() if state != "done"]
        parts += [f"after {duration(time.monotonic() - self.began)}"]
        return ", ".join(parts) + self.time_left()

    def time_left(self) -> str:
        """The time left if other jobs are like those that are done here; empty before one is."""
        if not (self.estimates and self.seconds_done and self.running):
            return ""
        mean = fmean(self.seconds_done)
        own = [run.left(mean) for run in self.running.values()]
        waiting = mean * (self.total - self.counts.total() - len(own))
        seconds = max(*own, (sum(own) + waiting) / len(own))
        return f", about {duration(seconds)} left" if seconds >= 1 else ""


class LiveTable(Display):
    """The running jobs in a table that is redrawn every second; ``console`` is for tests."""

    def __init__(self, total: int, *, console: Console | None = None) -> None:
        super().__init__(total, seconds=1.0, shown=-math.inf)
        from rich.live import Live

        # Without a thread of its own, since processes are started from this one.
        self._live = Live(console=console, auto_refresh=False)
        self._ended: list[tuple[Job, dict[str, Any]]] = []

    def __enter__(self) -> LiveTable:
        self._live.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.show()
        self._live.__exit__(*args)

    def ended(self, job: Job) -> None:
        super().ended(job)
        self._ended.append((job, read_status(job.folder)))
        self.shown = -math.inf

    def show(self) -> None:
        self._live.update(self.table(), refresh=True)

    def say(self, text: str) -> None:
        self._live.console.print(text, highlight=False, markup=False)

    def event(self, text: str) -> None: ...  # the table has it

    def table(self) -> Table:
        """The newest ended jobs, failed ones first, and all running jobs."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.summary(), title_justify="left", expand=False)
        for name, style in (("job", ""), ("state", ""), ("device", "dim")):
            table.add_column(name, style=style, overflow="fold")
        for name in ("step", "loss", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        bad = [entry for entry in self._ended if entry[1].get("state") != "done"]
        good = [entry for entry in self._ended if entry[1].get("state") == "done"]
        for job, status in [*bad[-_MOST_ENDED:], *good[-_MOST_ENDED:]]:
            state = status.get("state", "")
            style = "green" if state == "done" else "red"
            step, loss = newest(job.folder)
            cells = (status.get("device") or "", str(step), loss, "")
            table.add_row(Text(job.label), Text(state, style=style), *cells)
        for run in self.running.values():
            cells = (run.device, run.steps, run.loss, duration(run.left()))
            table.add_row(Text(run.job.label), "running", *cells)
        return table


def make_display(total: int) -> Display:
    """The table if stdout is a terminal that can draw it again, else lines."""
    return LiveTable(total) if has_styles() else Display(total)


def newest(folder: Path) -> tuple[int, str]:
    """A run's newest step with a training loss, and the main prediction's loss as text, or that of
    frozen trunks' heads; 0 and no text before."""
    file = folder / METRICS_FILE
    latest = read_newest(file, "train/loss_depth_0") or read_newest(file, "train/loss")
    step, loss = latest or (0, math.nan)
    return step, "" if math.isnan(loss) else f"{loss:.3f}"


def duration(seconds: float) -> str:
    """75 -> 1:15; 3,700 -> 1:01:40; empty for NaN."""
    if math.isnan(seconds):
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""One job: a new process with a log, a status file and a lock."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mtp_lightning.errors import UserError
from mtp_lightning.run.layout import LOG_FILE, METRICS_FILE, STATUS_FILE, SUMMARY_FILE
from mtp_lightning.run.lock import Lock
from mtp_lightning.run.status import last_words, now, state_of, write_status
from sweeps.devices import Devices

_LOCK_FILE = ".lock"
# A job that has written nothing for this long may be dead.
SILENT_SECONDS = 600.0


@dataclass(frozen=True)
class Job:
    """A run to be done."""

    folder: Path  # absolute; its name identifies the job in its sweep
    overrides: tuple[str, ...]  # those that determine its results, for its status file
    command: tuple[str, ...]  # the whole command line, including the folder
    processes: int = 1  # that train together on each machine
    nodes: int = 1  # machines that train together
    max_steps: int | None = None  # optimizer steps, to estimate its time; None if unknown
    on_cpu: bool = False  # whether it asks for the CPU even if there are GPUs
    labels: tuple[str, ...] = ()  # overrides that distinguish it from the others of its sweep
    cwd: Path = field(default_factory=Path.cwd)  # where relative paths of its overrides start

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        """Its name in a line of output."""
        return " ".join(self.labels) or self.name

    @property
    def steps_in_words(self) -> str:
        return f"{self.max_steps:,} steps" if self.max_steps else "steps by compare.match"


def refuse_several_machines(job: Job) -> None:
    """Raises a UserError for a job that needs several machines, for launchers that give each job
    one machine."""
    if job.nodes != 1:
        raise UserError(
            f"trainer.num_nodes={job.nodes} in a sweep takes hydra/launcher=slurm: elsewhere a "
            "job runs on one machine."
        )


class JobProcess:
    """A running job, which ends with this process.

    Args:
        ignore_usr2: whether its processes ignore SIGUSR2, which Slurm sends to them too.
        grace_seconds: seconds to save and end when asked to, before it is killed.
        check: called while it waits for a process of an earlier start; raises to end the wait.
    """

    def __init__(
        self,
        job: Job,
        devices: Devices,
        *,
        ignore_usr2: bool = False,
        grace_seconds: float,
        check: Callable[[], object] | None = None,
    ) -> None:
        self.job = job
        self.devices = devices
        self.stopping: str | None = None  # why it was asked to end; None if it was not
        self.abandoned = False  # whether another worker has the job
        self._grace = grace_seconds
        self._kill_at = math.inf
        job.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(job.folder / _LOCK_FILE)
        # A killed sweep leaves jobs that are still saving.
        if not self._lock.wait(seconds=grace_seconds + 60, before=check):
            raise BlockingIOError(f"{job.folder} is still in use by a process of an earlier start.")
        # If the job finished after its sweep was killed, or while Slurm queued it again, run
        # ``true`` in its place, which records it as done.
        finished = job.nodes == 1 and _has_finished(job.folder)
        self._command = ("true",) if finished else job.command
        self._started = now()
        with ExitStack() as undo:  # where it cannot be started, last first
            undo.callback(self._lock.release)
            self._watchdog = _Watchdog(grace_seconds)
            undo.callback(self._watchdog.dismiss)
            self.group = self._watchdog.group  # the process group of all its processes
            self._popen = self._start(ignore_usr2)
            undo.callback(self._popen.wait)
            undo.callback(self.kill)
            self._write("running")  # fails on a full disk
            undo.pop_all()

    def _start(self, ignore_usr2: bool) -> subprocess.Popen[bytes]:
        with (self.job.folder / LOG_FILE).open("ab") as log:
            if log.tell():
                log.write(f"\n--- started again {self._started}\n".encode())
                log.flush()
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.devices.environment(),
                pass_fds=(self._lock.file,),
                process_group=self.group,
                preexec_fn=ignore_signal if ignore_usr2 else None,
                cwd=self.job.cwd,
            )

    def ended(self) -> bool:
        """Whether it has ended; then its status file says how."""
        code = self._popen.poll()
        if code is None:
            if time.monotonic() > self._kill_at:
                self.kill()
            return False
        self._watchdog.dismiss()
        self._lock.release()
        if self.abandoned:
            return True
        state, reason = self._judge(code)
        self._write(state, ended=now(), exit_code=code, reason=reason)
        return True

    def wait(self) -> None:
        while not self.ended():
            time.sleep(0.2)

    def stop(self, reason: str) -> None:
        """Asks all of its processes to save and end, with a reason for its status; :meth:`ended`
        kills those that are too slow."""
        self.stopping = self.stopping or reason
        self._kill_at = time.monotonic() + self._grace
        self._signal(signal.SIGTERM)

    def abandon(self) -> None:
        """Kills it without changing its status, because another worker has started the job."""
        self.abandoned = True
        self.kill()

    def kill(self) -> None:
        self.stopping = self.stopping or "killed"
        self._signal(signal.SIGKILL)

    def _signal(self, signum: int) -> None:
        with suppress(ProcessLookupError):  # all of its processes have ended
            os.killpg(self.group, signum)

    def _judge(self, code: int) -> tuple[str, str | None]:
        asked = self.stopping
        for signum in (signal.SIGINT, signal.SIGTERM):
            if code in (-signum, 128 + signum):
                asked = asked or f"ended by {signum.name}"
        if code == 0 and (self.job.folder / SUMMARY_FILE).is_file():
            return "done", None
        if asked is not None:  # it may have been about to end: with keep=none it could not continue
            return ("done", None) if _has_finished(self.job.folder) else ("interrupted", asked)
        if code == 0:
            return "failed", f"ended without {SUMMARY_FILE}"
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (by the system, if its memory was full)" if -code == signal.SIGKILL else ""
            return "failed", f"killed by {name}{hint}"
        return "failed", f"exit code {code}: {last_words(self.job.folder / LOG_FILE)}"

    def _write(self, state: str, **values: object) -> None:
        write_status(
            self.job.folder,
            self.job.overrides,
            state,
            device=self.devices.name,
            pid=self._popen.pid,
            started=self._started,
            **values,
        )


def _has_finished(folder: Path) -> bool:
    """Whether a job has a summary, and its status is done, or is running and older."""
    try:
        written = (folder / SUMMARY_FILE).stat().st_mtime_ns
        began = (folder / STATUS_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return False
    return {"done": True, "running": written >= began}.get(state_of(folder), False)


def silence(folder: Path) -> float:
    """Seconds since a job wrote a number, a line or its status."""
    files = (folder / name for name in (METRICS_FILE, LOG_FILE, STATUS_FILE))
    return time.time() - max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def is_gone(folder: Path) -> bool:
    """Whether the processes of a job whose status is running are gone, as after a power failure.

    Where locks do not reach other machines, a job there has some minutes to show that it lives.
    """
    return Lock(folder / _LOCK_FILE).is_free() and silence(folder) > SILENT_SECONDS


def ignore_signal() -> None:
    """Ignores Slurm's signal to all processes of a job; called before a child's program starts."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class _Watchdog:
    """A process group that is asked to end when this process is gone, for whatever reason.

    The system then closes the pipe that a shell in the group reads from. Signaling a run's first
    process is not enough: the others of a data-parallel run do not notice its end. The group is not
    in the terminal's foreground, so Ctrl-C does not reach it.

    Args:
        grace_seconds: seconds after which the rest of the group is killed.
    """

    def __init__(self, grace_seconds: float) -> None:
        waits = 'trap "" TERM; read -r _; kill -s TERM 0; sleep "$0"; kill -s KILL 0'
        self._shell = subprocess.Popen(
            ["sh", "-c", waits, str(grace_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        self.group = self._shell.pid  # the group exists until this object is dismissed

    def dismiss(self) -> None:
        """Kills the rest of the group, including itself."""
        os.killpg(self.group, signal.SIGKILL)
        self._shell.communicate()

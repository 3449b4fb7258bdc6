"""One job: a fresh process with a log, a status file and a lock."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sweeps.devices import Devices
from sweeps.files import Lock
from sweeps.status import LOG_FILE, last_words, now, write_status

SUMMARY_FILE = "summary.json"
_LOCK_FILE = ".lock"
_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class Task:
    """What has to be run.

    Attributes:
        folder: the run's, absolute.
        overrides: what the job computes, for its status file.
        command: the whole command line, the folder included.
        processes: that train together; each needs a device.
        max_steps: optimizer steps, to tell how long it takes; None where not known.
        on_cpu: whether it asks for the CPU, whatever else there is.
        labels: the overrides that tell it from the others of its sweep.
        cwd: where relative paths of its overrides start.
    """

    folder: Path
    overrides: tuple[str, ...]
    command: tuple[str, ...]
    processes: int = 1
    max_steps: int | None = None
    on_cpu: bool = False
    labels: tuple[str, ...] = ()
    cwd: Path = field(default_factory=Path.cwd)

    @property
    def label(self) -> str:
        """What to call it in a line."""
        return " ".join(self.labels) or self.folder.name


class JobProcess:
    """A task that runs.

    Args:
        task: what to run.
        devices: what it may use.
        bound: whether it ends when this process does, however that ends (Linux). Not where this
            process has other threads, of which one may hold a lock at the fork.
        deaf_to: signals that are meant for this process, though its children get them, too.
    """

    def __init__(
        self,
        task: Task,
        devices: Devices,
        *,
        bound: bool = True,
        deaf_to: Sequence[signal.Signals] = (),
    ) -> None:
        self.task = task
        self.devices = devices
        self.began = time.monotonic()
        self._stopping: str | None = None
        self._failing = False
        task.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(task.folder / _LOCK_FILE)
        _wait_for(self._lock, task.folder)
        self._started = now()
        with (task.folder / LOG_FILE).open("ab") as log:
            if log.tell():
                log.write(f"\n--- started again {self._started}\n".encode())
                log.flush()
            self._popen = subprocess.Popen(
                task.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=devices.environment(),
                pass_fds=(self._lock.file,),
                # Ctrl-C reaches the terminal's group: jobs are told by this process, once.
                start_new_session=True,
                preexec_fn=_setup(bound=bound and sys.platform == "linux", deaf_to=deaf_to),
                cwd=task.cwd,
            )
        self._write("running")

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end."""
        return self._stopping is not None

    def ended(self) -> bool:
        """Whether it has ended; then its status file says how."""
        if os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        # Processes that it has left behind, before its number is free for others.
        self._signal(signal.SIGKILL)
        code = self._popen.wait()
        self._lock.release()
        state, reason = self._judge(code)
        self._write(state, ended=now(), exit_code=code, reason=reason)
        return True

    def stop(self, reason: str, *, failed: bool = False) -> None:
        """Ask it to save and end.

        Args:
            reason: for its status.
            failed: whether it counts as failed instead of interrupted.
        """
        self._stopping, self._failing = reason, failed
        # The first process tells the others of its run itself.
        os.kill(self._popen.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self._stopping = self._stopping or "killed"
        self._signal(signal.SIGKILL)

    def _signal(self, signum: int) -> None:
        try:
            os.killpg(self._popen.pid, signum)
        except (ProcessLookupError, PermissionError):  # nobody, or zombies alone, on some systems
            return

    def _judge(self, code: int) -> tuple[str, str | None]:
        if code == 0 and (self.task.folder / SUMMARY_FILE).is_file():
            return "done", None
        if self._stopping is not None:
            return ("failed" if self._failing else "interrupted"), self._stopping
        for signum in (signal.SIGINT, signal.SIGTERM):
            if code in (-signum, 128 + signum):
                return "interrupted", f"ended by {signum.name}"
        if code == 0:
            return "failed", f"ended without {SUMMARY_FILE}"
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (by the system, if its memory was full)" if -code == signal.SIGKILL else ""
            return "failed", f"killed by {name}{hint}"
        return "failed", f"exit code {code}: {last_words(self.task.folder / LOG_FILE)}"

    def _write(self, state: str, **values: object) -> None:
        write_status(
            self.task.folder,
            self.task.overrides,
            state,
            device=str(self.devices),
            pid=self._popen.pid,
            started=self._started,
            **values,
        )


def _wait_for(lock: Lock, folder: Path, *, seconds: float = 60.0) -> None:
    """A sweep that was killed leaves jobs that are still saving."""
    until = time.monotonic() + seconds
    while not lock.acquire():
        if time.monotonic() > until:
            raise BlockingIOError(f"{folder} is still in use by a process of an earlier start.")
        time.sleep(0.1)


def _setup(*, bound: bool, deaf_to: Sequence[signal.Signals]) -> Callable[[], None] | None:
    """What the child does before its program begins."""
    if not (bound or deaf_to):
        return None
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl if bound else None

    def setup() -> None:
        for signum in deaf_to:
            signal.signal(signum, signal.SIG_IGN)
        if prctl is not None:
            # SIGTERM, at which a run saves, when the parent is gone.
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # gone already
                os._exit(128 + signal.SIGTERM)

    return setup


def python_command(script: Path, overrides: Sequence[str], folder: Path) -> tuple[str, ...]:
    """The command line of a run in ``folder``, which lies in the sweep's."""
    # The sweep's folder too: its default holds the time, in which jobs would differ.
    places = (f"run_dir={quoted(str(folder))}", f"sweep_dir={quoted(str(folder.parent))}")
    return (sys.executable, str(script), *overrides, *places)


def quoted(text: str) -> str:
    """A value as Hydra's grammar reads it back."""
    return "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"

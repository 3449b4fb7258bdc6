"""The project's commands as forks of a process that has imported their packages.

The imports of torch and Lightning would take ten times as long as a case. A fork runs the command's
``main`` with its ``sys.argv``, in a new session with the default signal handlers, and ends as an
interpreter does.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.cases import hold
from tests.integration.helpers import ROOT, environment
from tests.warm import code_of

# What changes a process before its command begins.
Change = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit status; minus the signal that ended it.
        out: its standard output and standard error.
        seconds: its wall time.
        busy: its CPU time in seconds, with its children's.
        timed_out: whether it was killed for taking too long.
        memory: its peak memory in bytes.
    """

    code: int
    out: str
    seconds: float
    busy: float
    timed_out: bool
    memory: int

    @property
    def errors(self) -> list[str]:
        """Its lines that begin as an error's sentence does."""
        return [line for line in self.out.splitlines() if line.startswith("error: ")]

    def require(self, *codes: int) -> None:
        """Hold that it ended by itself, without a traceback and with one of these codes."""
        hold(not self.timed_out, "it does not end")
        hold("Traceback" not in self.out, f"a traceback: {self.out[-2500:]}")
        hold(self.code in codes, f"code {self.code}: {self.out[-1500:]}")


class Process:
    """A command that runs.

    Args:
        arguments: the app (``train.py``) and its arguments, or ``-m`` and a module.
        log: the file of both outputs.
        folder: the working directory.
        change: a function that the process calls before its command.
        memory: bytes that it may add to its memory; None for no limit.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        *,
        folder: Path = ROOT,
        change: Change | None = None,
        memory: int | None = None,
    ) -> None:
        self.log = log
        self.began = time.monotonic()
        self._memory, self._busy = 0, 0.0
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(arguments, log, folder, change, memory)
        self.code: int | None = None

    def ended(self) -> bool:
        """Whether it has ended by now."""
        if self.code is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self._memory = usage.ru_maxrss * 1024
                self._busy = usage.ru_utime + usage.ru_stime
                self.seconds = time.monotonic() - self.began
        return self.code is not None

    def signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if not self.ended():
            os.kill(self.pid, number)

    def sleep(self, seconds: float) -> bool:
        """Wait so long, or until it has ended; whether it has."""
        until = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < until:
            time.sleep(0.002)
        return self.ended()

    def sleep_busy(self, seconds: float) -> bool:
        """Wait until it has used so many seconds of CPU, or has ended; whether it has."""
        tick = os.sysconf("SC_CLK_TCK")
        while not self.ended():
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            if (int(fields[11]) + int(fields[12])) / tick >= seconds:
                break
            time.sleep(0.002)
        return self.ended()

    def members(self) -> list[int]:
        """The processes of its session, itself among them."""
        pids = [self.pid]
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            if int(fields[3]) == self.pid and fields[0] != "Z":
                pids.append(int(stat.parent.name))
        return sorted(set(pids))

    def alone(self, *, seconds: float) -> None:
        """Wait until nothing is left of what it started; what stays longer is ended."""
        until = time.monotonic() + seconds
        while (left := [pid for pid in self.members() if pid != self.pid]) and (
            time.monotonic() < until
        ):
            time.sleep(0.02)
        for pid in left:
            os.kill(pid, signal.SIGKILL)

    def end(self, *, timeout: float = 120) -> Ended:
        """Wait for its end, and kill it after ``timeout`` seconds."""
        timed_out = not self.sleep(timeout)
        if timed_out:
            os.killpg(self.pid, signal.SIGKILL)
            self.sleep(10)
        assert self.code is not None
        used = {"seconds": self.seconds, "busy": self._busy, "memory": self._memory}
        out = self.log.read_text(errors="replace")
        return Ended(code=self.code, out=out, timed_out=timed_out, **used)


def run(
    arguments: list[str],
    log: Path,
    *,
    folder: Path = ROOT,
    change: Change | None = None,
    memory: int | None = None,
    timeout: float = 120,
) -> Ended:
    """Run a command to its end; arguments as :class:`Process`."""
    return Process(arguments, log, folder=folder, change=change, memory=memory).end(timeout=timeout)


def warm() -> None:
    """Import what the commands import, so that no fork has to."""
    os.environ.update(environment())
    import mtp_lightning.decoding.generate
    import mtp_lightning.experiment.evaluating
    import mtp_lightning.experiment.training  # noqa: F401

    gc.collect()
    gc.freeze()


def _become(
    arguments: list[str], log: Path, folder: Path, change: Change | None, memory: int | None
) -> None:
    """Turn this fork into the command. Never returns."""
    code = 1
    try:
        os.setsid()
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        if memory is not None:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
        if change is not None:
            change()
        app, *rest = arguments
        code = code_of(arguments if app == "-m" else [str(ROOT / app), *rest])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

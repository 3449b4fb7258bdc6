"""A plugin of pytest: a test leaves no process, and no file in the checkout.

What a test leaves fails it, by name, in whichever process of pytest-xdist it ran. Files are looked
for after every test where a run would write them by default, and at the end everywhere.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

# Where a run that is started in the checkout writes.
_FOLDERS = ("checkpoints", "lightning_logs", "multirun", "outputs", "runs")
# What Python and the tools of a checkout keep for themselves.
_KEPT = (".git", "__pycache__", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache")
# These end with the process that they serve; the second is tests/warm.py.
_HELPERS = ("multiprocessing.resource_tracker", "-m tests.warm")
_MARK = "MTP_TESTS_PROCESS"
# A killed sweep's watchdog (sweeps/process.py) lives for the grace that it gives the runs: where
# nothing but watchdogs is left, they have nothing to watch.
_WATCHDOG = 'trap "" TERM; read -r _'
_KERNEL = 2  # the parent of the system's own threads
_BEGINNING = 0.2  # seconds in which a process begins its program


class Leftovers:
    """Watches one process of pytest.

    Ctrl-C ends what tests start however the tests were started: a shell without job control has
    background commands ignore it, and their children inherit that.

    Args:
        root: the checkout.
        seconds: that a process has to be gone after it was told to.
    """

    def __init__(self, root: Path, *, seconds: float = 5.0) -> None:
        self.root = root
        self._seconds = seconds
        # Every process below has it in its environment, whoever has become its parent.
        self._mark = f"{os.getpid()}.{time.time_ns()}"
        os.environ[_MARK] = self._mark
        self._foreign: set[int] = set()
        self._unknown: set[int] = set()
        self._held: set[int] = set()
        self._listed: set[str] = set()
        self._files: set[str] = set()
        self._new_files: list[str] = []
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._processes()
        self._listed = self._listing()
        if not _is_worker(session):
            self._files = set(self._walk())

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        """What a fixture of several tests has started may live until the last test is over."""
        made = yield
        if fixturedef.scope != "function":
            self._held |= self._started()
        return made

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, nextitem: pytest.Item | None) -> Generator[None, Any, Any]:
        try:
            return (yield)
        finally:
            if nextitem is None:
                self._held.clear()
            self._judge()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not _is_worker(session):
            self._new_files = sorted(set(self._walk()) - self._files)
            if self._new_files:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for name in self._new_files:
            terminalreporter.write_line(f"new in the checkout since the tests began: {name}")

    def _judge(self) -> None:
        began = time.monotonic()
        # A process whose program begins right now may be the test's.
        while (left := self._processes()) or self._unknown:
            if not left:
                if time.monotonic() - began > _BEGINNING:  # its environment is empty
                    self._foreign |= self._unknown
                    self._unknown = set()
                time.sleep(0.005)
                continue
            commands = list(left.values())
            watchdogs = [command for command in commands if _WATCHDOG in command]
            sleeps = [command for command in commands if command.startswith("sleep ")]
            if watchdogs and len(watchdogs) + len(sleeps) == len(commands):
                _kill(left)
            if time.monotonic() - began > self._seconds:
                break
            gc.collect()  # the owner may wait for it
            time.sleep(0.02)
        told = [f"left a process: {pid} {command}" for pid, command in left.items()]
        _kill(left)
        listed = self._listing()
        for name in sorted(listed - self._listed):
            told.append(f"left in the checkout (or another test did at the same time): {name}")
        self._listed = listed
        if told:
            pytest.fail("\n".join(told), pytrace=False)

    def _processes(self) -> dict[int, str]:
        """What a test must not leave: numbers and commands."""
        found = {pid: _command(pid) for pid in self._started()}
        return {
            pid: command
            for pid, command in found.items()
            if command and not any(helper in command for helper in _HELPERS)
        }

    def _started(self) -> set[int]:
        """What this process has started that lives, and no fixture holds.

        A process that was forked and forgotten by a fork is not found; one that began a program is.
        One that begins its program right now has no command yet.
        """
        parents, marked = dict[int, int](), f"{_MARK}={self._mark}".encode()
        ours, unknown = set[int](), set[int]()
        numbers = _numbers()
        for pid in numbers - self._foreign:
            try:
                stat = Path(f"/proc/{pid}/stat").read_text()
                state, parent = stat.rpartition(")")[2].split()[:2]
                if state in "ZX":  # ended, and not waited for
                    continue
                parents[pid] = int(parent)
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if marked in environment:
                    ours.add(pid)
                elif environment == [b""] and parents[pid] != _KERNEL:  # its program begins
                    unknown.add(pid)
            except OSError:  # it has ended, or is another user's
                continue
        ours = _with_children({os.getpid(), *ours}, parents) - {os.getpid()}
        self._foreign = numbers - ours - unknown
        self._unknown = unknown
        return ours - _with_children(self._held, parents)

    def _listing(self) -> set[str]:
        """Names in the checkout, and in the folders of runs."""
        folders = [self.root, *(self.root / name for name in _FOLDERS)]
        return {
            str((folder / name).relative_to(self.root))
            for folder in folders
            if folder.is_dir()
            for name in os.listdir(folder)
            if not _is_kept(name)
        }

    def _walk(self) -> Iterator[str]:
        """All files of the checkout."""
        for folder, folders, names in os.walk(self.root):
            if "pyvenv.cfg" in names:
                folders.clear()
                continue
            folders[:] = [name for name in folders if not _is_kept(name)]
            for name in names:
                if not _is_kept(name):
                    yield str((Path(folder) / name).relative_to(self.root))


def _is_worker(session: pytest.Session) -> bool:
    return hasattr(session.config, "workerinput")


def _is_kept(name: str) -> bool:
    return name in _KEPT or name.startswith(".coverage")


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _numbers() -> set[int]:
    """Of all processes; none where the system does not list them."""
    if not os.path.isdir("/proc/self"):
        return set()
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def _with_children(pids: set[int], parents: dict[int, int]) -> set[int]:
    """Some processes and all below them."""
    grown = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in grown} - grown:
        grown |= more
    return grown


def _command(pid: int) -> str:
    """What a process runs; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""

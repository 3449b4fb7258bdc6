"""A pytest plugin: a test that leaves a process, or a file in the checkout, fails.

Files are searched after every test in the default folders of runs, and at the end of all tests in
the whole checkout.
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

# The folders in which a run that is started in the checkout writes.
_FOLDERS = ("checkpoints", "lightning_logs", "multirun", "outputs", "runs")
# Files of Python and of the tools of a checkout.
_KEPT = (".git", "__pycache__", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache")
# These end with the process that they serve; the second is tests/warm.py.
_HELPERS = ("multiprocessing.resource_tracker", "-m tests.warm")
_MARK = "MTP_TESTS_PROCESS"
# After a sweep is killed, its watchdog (sweeps/process.py) gives the runs time to end. If only
# watchdogs are left, no run is left, and they are killed.
_WATCHDOG = 'trap "" TERM; read -r _'
_KERNEL = 2  # the parent of the system's own threads
_BEGINNING = 0.2  # seconds in which a process begins its program


class Leftovers:
    """Watches one process of pytest.

    It also restores Ctrl-C for the programs that tests start: a shell without job control makes
    background commands, and so their children, ignore it.

    Args:
        root: the checkout.
        seconds: the time that a process has to end.
    """

    def __init__(self, root: Path, *, seconds: float = 5.0) -> None:
        self.root = root
        self._seconds = seconds
        # Every descendant has the mark in its environment, also after its parent has ended.
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
        """Processes of a fixture for several tests may live until the last test has ended."""
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
        failures = [f"left a process: {pid} {command}" for pid, command in left.items()]
        _kill(left)
        listed = self._listing()
        # What another test makes at the same time and removes is left by neither.
        while listed - self._listed and time.monotonic() - began < self._seconds:
            time.sleep(0.02)
            listed = self._listing()
        for name in sorted(listed - self._listed):
            failures.append(f"left in the checkout (or another test did at the same time): {name}")
        self._listed = listed
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)

    def _processes(self) -> dict[int, str]:
        """The numbers and commands of processes that a test must not leave."""
        commands = {pid: _command(pid) for pid in self._started()}
        return {
            pid: command
            for pid, command in commands.items()
            if command and not any(helper in command for helper in _HELPERS)
        }

    def _started(self) -> set[int]:
        """The living descendants of this process that no fixture holds.

        An orphan of a fork is found only after it has begun a program. A process that begins its
        program at this moment has no command yet.
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
    """The numbers of all processes; none if the system does not list them."""
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
    """The command of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""

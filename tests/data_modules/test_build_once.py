"""Concurrent builds of one cache folder: one builds, and a builder that ends is succeeded."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_modules.cache import build_once
from tests.data_modules.programs import start

BUILDER = """
import subprocess, sys
from pathlib import Path
from data_modules.cache import build_once

def build(folder):
    (folder / "whole").write_text("first")
    if sys.argv[2] == "killed":  # a command that ends later
        subprocess.Popen(["cat"], stdout=subprocess.DEVNULL, close_fds=False)
    print("building", flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "failed":
        raise SystemExit("no text")

build_once(Path(sys.argv[1]), build)
"""


def build_second(folder: Path) -> None:
    (folder / "whole").write_text("second")


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes locks fail, as on Lustre without ``-o flock``."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


def assert_only_the_target(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["target"]
    assert {path.name for path in (folder / "target").iterdir()} == {"whole", "digests.json"}


@pytest.mark.parametrize(("end", "built_by"), [("built", 1), ("failed", 2), ("killed", 2)])
def test_a_process_waits_for_the_builder_and_succeeds_it(tmp_path, caplog, end, built_by):
    process = start(BUILDER, tmp_path / "target", end, stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING):
        waiting = pool.submit(build_once, tmp_path / "target", build_second)
        while "another process builds" not in caplog.text:
            time.sleep(0.01)
            assert not waiting.done()
        if end == "killed":
            process.send_signal(signal.SIGKILL)
        else:
            process.communicate("\n")
        waiting.result(120)
    process.communicate()
    assert caplog.text.count("another process builds") == 1
    assert (tmp_path / "target" / "whole").read_text() == ["first", "second"][built_by - 1]
    assert_only_the_target(tmp_path)


@pytest.mark.parametrize("locks", [True, False])
def test_one_of_many_threads_builds_or_the_first_to_finish_wins(tmp_path, monkeypatch, locks):
    if not locks:
        without_locks(monkeypatch)
    folders, together = [], threading.Barrier(1 if locks else 6)

    def build(folder: Path) -> None:
        folders.append(folder)
        together.wait(120)
        time.sleep(0.3)
        (folder / "whole").write_text("x")

    with ThreadPoolExecutor(6) as pool:
        targets = list(pool.map(lambda _: build_once(tmp_path / "target", build), range(6)))
    assert targets == [tmp_path / "target"] * 6 and len(folders) == (1 if locks else 6)
    assert_only_the_target(tmp_path)


def test_the_loser_of_two_builds_uses_the_winners_folder(tmp_path, monkeypatch):
    without_locks(monkeypatch)

    def slower(folder: Path) -> None:
        build_once(tmp_path / "target", build_second)
        (folder / "whole").write_text("first")

    build_once(tmp_path / "target", slower)
    assert (tmp_path / "target" / "whole").read_text() == "second"
    assert_only_the_target(tmp_path)


def test_a_lock_that_cannot_be_opened_stops_no_build(tmp_path: Path) -> None:
    (tmp_path / ".target.lock").mkdir()
    build_once(tmp_path / "target", build_second)
    (tmp_path / ".target.lock").rmdir()
    assert_only_the_target(tmp_path)


@pytest.mark.parametrize("case", ["elsewhere", "no locks"])
def test_files_of_a_build_that_may_live_stay_for_a_day(tmp_path, monkeypatch, case):
    if case == "no locks":
        without_locks(monkeypatch)
    machine = "elsewhere" if case == "elsewhere" else os.uname().nodename
    folder, old = tmp_path / f".target.building-0@{machine}", (time.time() - 90_000,) * 2
    folder.mkdir()
    (folder / "half").touch()
    os.utime(folder, old)
    build_once(tmp_path / "target", build_second)
    assert (folder / "half").exists()
    os.utime(folder / "half", old)
    build_once(tmp_path / "other", build_second)
    assert not folder.exists()

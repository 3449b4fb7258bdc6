"""Concurrent builds of one cache folder: one builds, and a killed builder is replaced."""

from __future__ import annotations

import errno
import fcntl
import logging
import re
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_modules import build_turn, cache
from data_modules.cache import build_once
from tests.data_modules.programs import start


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_turn, "BEAT", 0.1)
    monkeypatch.setattr(build_turn, "SILENCE", 2.0)


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes locks fail, as on Lustre without ``-o flock``."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


def assert_only_the_target(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["target"]
    assert {path.name for path in (folder / "target").iterdir()} == {"whole", "digests.json"}


@pytest.mark.parametrize("locks", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_of_many_callers_builds(tmp_path, monkeypatch, locks: bool) -> None:
    """The build takes longer than SILENCE."""
    if not locks:
        without_locks(monkeypatch)
    folders = []

    def build(folder: Path) -> None:
        folders.append(folder)
        time.sleep(2.4)
        (folder / "whole").write_text("x")

    with ThreadPoolExecutor(6) as pool:
        targets = list(pool.map(lambda _: build_once(tmp_path / "target", build), range(6)))
    assert targets == [tmp_path / "target"] * 6 and len(folders) == 1
    assert_only_the_target(tmp_path)


def test_a_waiting_caller_builds_after_a_failed_build(tmp_path: Path) -> None:
    started, fail = threading.Event(), threading.Event()

    def failing(folder: Path) -> None:
        started.set()
        assert fail.wait(120)
        raise ValueError("no text")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(build_once, tmp_path / "target", failing)
        assert started.wait(120)
        second = pool.submit(build_once, tmp_path / "target", lambda f: (f / "a").touch())
        time.sleep(0.2)
        assert not second.done()
        fail.set()
        with pytest.raises(ValueError, match="no text"):
            first.result()
        second.result()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


BUILDER = """
import sys, time
from pathlib import Path
from data_modules.cache import build_once

def build(folder):
    (folder / "half").touch()
    print("building", flush=True)
    time.sleep(60)

build_once(Path(sys.argv[1]), build)
"""


@pytest.fixture
def killed_build(tmp_path: Path) -> Path:
    """The temporary folder of a builder that was killed."""
    process = start(BUILDER, tmp_path / "target")
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (folder,) = tmp_path.iterdir()
    return folder


def test_a_killed_builder_of_this_machine_is_replaced_at_once(tmp_path, killed_build, monkeypatch):
    monkeypatch.setattr(build_turn, "SILENCE", 1e9)
    assert list(killed_build.glob("*/half"))
    build_once(tmp_path / "target", lambda folder: (folder / "whole").touch())
    assert_only_the_target(tmp_path)


@pytest.mark.parametrize("case", ["elsewhere", "no locks"])
def test_a_silent_builder_is_replaced_later(tmp_path, killed_build, monkeypatch, caplog, case):
    if case == "elsewhere":
        (killed_build / ".machine").write_text("another start of another system")
    else:
        without_locks(monkeypatch)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        build_once(tmp_path / "target", lambda folder: (folder / "whole").touch())
    assert 1.0 < time.monotonic() - began < 120
    assert caplog.text.count("another process builds") == 1
    # That builder may be asleep: its folder stays until it has been silent for much longer.
    assert {path.name for path in tmp_path.iterdir()} == {"target", killed_build.name}


STOPPED = """
import sys
from pathlib import Path
from data_modules.cache import build_once

def build(folder):
    print("building", flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "makes it again":
        folder.mkdir(parents=True)
    (folder / "of the stopped one").touch()

try:
    print(build_once(Path(sys.argv[1]), build))
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("stopped", ["writes", "makes it again"])
@pytest.mark.parametrize("new", ["builds", "has built"])
def test_a_builder_that_was_stopped_leaves_the_new_one_alone(tmp_path, monkeypatch, stopped, new):
    """Its folder was removed, and the new builder's has the same name."""
    process = start(STOPPED, tmp_path / "target", stopped, stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "STALE_SECONDS", -60)
        build_once(tmp_path / "other", lambda folder: None)
    started, finish = threading.Event(), threading.Event()

    def build(folder: Path) -> None:
        assert folder.parent.name == ".target.building-1"
        started.set()
        assert finish.wait(120)
        (folder / "whole").touch()

    with ThreadPoolExecutor(1) as pool:
        built = pool.submit(build_once, tmp_path / "target", build)
        assert started.wait(120)
        if new == "has built":
            finish.set()
            built.result()
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate("\n")
        finish.set()
        built.result()
    removed = "the unfinished .*target was removed, as this process was stopped: start again\n"
    assert re.fullmatch(removed if new == "builds" else ".*/target\n", output)
    shutil.rmtree(tmp_path / "other")
    assert_only_the_target(tmp_path)

"""Of all that want a folder one builds it, and a builder that was killed is replaced."""

from __future__ import annotations

import errno
import fcntl
import logging
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_modules import build_turn
from data_modules.cache import build_once
from tests.data_modules.programs import start


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_turn, "BEAT", 0.1)
    monkeypatch.setattr(build_turn, "SILENCE", 2.0)


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes locks fail, as on Lustre without ``-o flock``."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("locks", [True, False])
def test_one_of_many_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    """The build takes longer than SILENCE."""
    if not locks:
        without_locks(monkeypatch)
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(3.0)
        (folder / "whole").write_text("x")

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: build_once(tmp_path / "target", build), range(6)))
    assert found == [tmp_path / "target"] * 6 and len(built) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert {path.name for path in (tmp_path / "target").iterdir()} == {"whole", "digests.json"}


def test_the_next_one_builds_where_one_has_failed(tmp_path: Path) -> None:
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
def killed(tmp_path: Path) -> Path:
    """The temporary folder of a builder that was killed."""
    process = start(BUILDER, tmp_path / "target")
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = tmp_path.iterdir()
    return left


def test_a_killed_builder_of_this_machine_is_not_waited_for(tmp_path, killed, monkeypatch):
    monkeypatch.setattr(build_turn, "SILENCE", 1e9)
    assert (killed / "half").exists()
    build_once(tmp_path / "target", lambda folder: (folder / "whole").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert {path.name for path in (tmp_path / "target").iterdir()} == {"whole", "digests.json"}


@pytest.mark.parametrize("why", ["elsewhere", "no locks"])
def test_another_builder_is_given_up_when_it_is_silent(tmp_path, killed, monkeypatch, caplog, why):
    if why == "elsewhere":
        (killed / ".machine").write_text("another start of another system")
    else:
        without_locks(monkeypatch)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        build_once(tmp_path / "target", lambda folder: (folder / "whole").touch())
    assert 1.0 < time.monotonic() - began < 120
    assert caplog.text.count("another process builds") == 1
    # That builder may be asleep: its folder stays until it has been silent for much longer.
    assert {path.name for path in tmp_path.iterdir()} == {"target", killed.name}

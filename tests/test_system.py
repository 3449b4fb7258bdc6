"""Differences of operating systems: disks without fsync, and children that end with a parent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_modules.cache import build_once
from mtp_lightning.run.atomic import write_json

ROOT = Path(__file__).parents[1]


def _file(folder: Path) -> Path:
    write_json({"a": 1}, folder / "file.json")
    return folder / "file.json"


def _built(folder: Path) -> Path:
    return build_once(folder / "kind" / "key", lambda new: (new / "a").touch()) / "a"


@pytest.mark.parametrize("write", [_file, _built])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_a_disk_without_fsync_is_accepted_and_a_broken_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path], code: int
) -> None:
    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    if code != errno.EIO:
        assert write(tmp_path).exists()
        return
    with pytest.raises(OSError) as error:  # a broken disk
        write(tmp_path)
    assert error.value.errno == code


CHILD = """
import os, sys, time
sys.platform = sys.argv[2]
from mtp_lightning.system import end_with
print(end_with(int(sys.argv[1])), flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid()), sys.argv[2]])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_a_child_ends_with_its_parent(system: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT, CHILD, system]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "True\n"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
    # A child that starts after its parent's end learns of it.
    late = [sys.executable, "-c", CHILD.replace("60", "0"), str(parent.pid), system]
    done = subprocess.run(late, capture_output=True, text=True, env=environment)
    killed = system == "darwin" and done.returncode == -signal.SIGKILL  # before it could print
    assert killed or done.stdout == "False\n"
    parent.stdout.close()

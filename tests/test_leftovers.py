"""A test that leaves a file or a process fails, with one process of pytest and with several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CONFTEST = """
from pathlib import Path

from tests.leftovers import Leftovers


def pytest_configure(config):
    config.pluginmanager.register(Leftovers(Path(__file__).parent, seconds=0.2))
"""

TESTS = """
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_leaves_nothing():
    assert subprocess.run(["true"]).returncode == 0
    (HERE / "kept").write_text("")
    (HERE / "kept").unlink()


def test_leaves_a_file():
    (HERE / "stray").write_text("")


def test_leaves_a_checkpoint():
    (HERE / "checkpoints").mkdir(exist_ok=True)
    (HERE / "checkpoints" / "epoch=0.ckpt").write_text("")


def test_leaves_a_file_deep_down():
    (HERE / "deep" / "down").write_text("")


def test_leaves_a_child():
    test_leaves_a_child.started = subprocess.Popen(SLEEP)
    print("pid", test_leaves_a_child.started.pid)


def test_leaves_an_orphan_in_another_session():
    child = subprocess.run(
        [sys.executable, "-c", "import subprocess, sys; print(subprocess.Popen(sys.argv[1:],"
         "start_new_session=True, stdout=-3, stderr=-3).pid)", *SLEEP],
        capture_output=True, text=True,
    )
    print("pid", child.stdout)


def test_leaves_a_fork():
    if not (pid := os.fork()):
        time.sleep(600)
        os._exit(0)
    print("pid", pid)


@pytest.fixture(scope="module")
def server():
    with subprocess.Popen(SLEEP) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [1, 2])
def test_two_look_at_one_process(server, number):
    assert server.poll() is None


def test_children_hear_ctrl_c():
    with subprocess.Popen(SLEEP, stderr=subprocess.DEVNULL) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (-signal.SIGINT, 1)
"""


def ignore_ctrl_c() -> None:
    """As for the background processes of a shell without job control."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize(("processes", "way"), [(0, "background"), (2, "setsid")])
def test_a_leftover_fails_the_test_that_left_it(tmp_path: Path, processes: int, way: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    variables = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", "-rA", "-n", str(processes), tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | variables,
        preexec_fn=ignore_ctrl_c if way == "background" else None,
        start_new_session=way == "setsid",
        timeout=120,
    )
    output = done.stdout
    assert done.returncode == 1, output + done.stderr
    lines = output.splitlines()
    failed = {line.split("::")[1].split()[0] for line in lines if line.startswith("ERR")}
    left = {"a_file", "a_checkpoint", "a_child", "an_orphan_in_another_session", "a_fork"}
    expected = {f"test_leaves_{name}" for name in left}
    # With several processes, a file may also fail the test of the other process.
    assert failed >= expected and (processes or failed == expected), output
    assert "FAILED" not in output and "9 passed" not in output
    for name in ("stray", "checkpoints", "checkpoints/epoch=0.ckpt"):
        assert f"at the same time): {name}" in output
    new = {line.split(": ")[1] for line in lines if line.startswith("new in the check")}
    assert new == {"stray", "checkpoints/epoch=0.ckpt", "deep/down"}
    pids = [int(line.split()[1]) for line in lines if line.startswith("pid ")]
    assert len(set(pids)) == 3
    for pid in pids:
        assert f"left a process: {pid} " in output
        until = time.monotonic() + 60
        while os.path.exists(f"/proc/{pid}"):
            assert time.monotonic() < until
            time.sleep(0.01)

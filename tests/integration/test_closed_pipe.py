"""Programs whose output nobody reads any more, as with ``| head -1``: a real pipe, closed by its
reader before anything is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.helpers import ROOT, command, environment
from tests.sweeps.fixture_runs import write_run


def unread(args: list[str], *, both: bool = False) -> tuple[int, str]:
    """Code of a command that writes to a closed pipe, and what it said on standard error.

    Args:
        args: the command.
        both: standard error goes to the same pipe.
    """
    read, write = os.pipe()
    os.close(read)
    try:
        pipes = {"stdout": write, "stderr": write if both else subprocess.PIPE}
        done = subprocess.run(args, timeout=240, env=environment(), cwd=ROOT, **pipes)
    finally:
        os.close(write)
    return done.returncode, "" if both else done.stderr.decode()


WORKS = """
import os, sys
from mtp_lightning.command_line.shell import readable_errors
from mtp_lightning.errors import UserError

with readable_errors(ends_with_reader=sys.argv[1] == "ends"):
    with readable_errors():  # as that of an app's task
        for _ in range(3):
            print("x" * 9000)
            print("told", file=sys.stderr, flush=True)
        os.write(1, b"by the file's number")
        open(sys.argv[2], "w").close()
        if sys.argv[1] == "fails":
            raise UserError("a sentence")
print("after it")
"""


@pytest.mark.parametrize(
    "how, code, whole, both",
    [
        ("works", 0, True, False),
        ("works", 0, True, True),
        ("fails", 1, True, False),
        ("ends", 141, False, False),
    ],
)
def test_a_reader_that_goes_ends_no_work(tmp_path, how, code, whole, both):
    made = tmp_path / "made"
    found, said = unread([sys.executable, "-c", WORKS, how, str(made)], both=both)
    assert (found, made.exists()) == (code, whole), said
    if not both:
        told = 0 if how == "ends" else 3
        assert said == "told\n" * told + "error: a sentence\n" * (how == "fails")


def test_help_that_nobody_reads_ends_quietly() -> None:
    words = ["-c", "from mtp_lightning.console import main; main()"]
    assert unread([sys.executable, *words, "--help"]) == (141, "")


def test_a_report_is_made_without_a_reader(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, loss in (("a", 2.0), ("b", 2.1)):
        write_run(tmp_path / name, {"seed": 0 if name == "a" else 1}, loss=loss)
    found = unread([sys.executable, "-m", "sweeps.report", str(tmp_path)])
    assert found == (0, "")
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_a_run_its_evaluation_and_its_text(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    code, said = unread(command(run_dir, tmp_path / "cache"))
    assert code == 0 and "rror" not in said, said
    assert (run_dir / "summary.json").is_file()
    numbers = tmp_path / "numbers.json"
    evaluated = [sys.executable, "evaluate.py", f"checkpoint={run_dir}", f"output={numbers}"]
    cache = f"paths.cache_dir={tmp_path / 'cache'}"
    assert unread([*evaluated, cache], both=True)[0] == 0
    assert numbers.is_file()
    text = [sys.executable, "generate.py", f"checkpoint={run_dir}", "prompt=ab", "output=text"]
    assert unread([*text, "max_new_tokens=5"]) == (141, "")

"""Programs whose reader has closed the pipe, as ``| head -1`` does, before they write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.helpers import ROOT, command, environment
from tests.sweeps.fixture_runs import write_run


def with_closed_pipe(args: list[str], *, both: bool = False) -> tuple[int, str]:
    """The exit code of a command that writes to a closed pipe, and its standard error.

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


PROGRAM = """
import os, sys
from mtp_lightning.command_line.shell import readable_errors
from mtp_lightning.errors import UserError

with readable_errors(ends_with_reader=sys.argv[1] == "ends"):
    with readable_errors():  # as in an app's task
        for _ in range(3):
            print("x" * 9000)
            print("line", file=sys.stderr, flush=True)
        os.write(1, b"by the file descriptor")
        open(sys.argv[2], "w").close()
        if sys.argv[1] == "fails":
            raise UserError("a sentence")
print("after it")
"""


@pytest.mark.parametrize(
    "how, code, finishes, both",
    [
        ("works", 0, True, False),
        ("works", 0, True, True),
        ("fails", 1, True, False),
        ("ends", 141, False, False),
    ],
)
def test_a_closed_pipe_ends_only_programs_that_end_with_their_reader(
    tmp_path, how, code, finishes, both
):
    file = tmp_path / "written"
    args = [sys.executable, "-c", PROGRAM, how, str(file)]
    exit_code, stderr = with_closed_pipe(args, both=both)
    assert (exit_code, file.exists()) == (code, finishes), stderr
    if not both:
        lines = 0 if how == "ends" else 3
        assert stderr == "line\n" * lines + "error: a sentence\n" * (how == "fails")


def test_streams_that_were_closed_before_the_start_are_replaced(tmp_path: Path) -> None:
    """By the null device, so that no file of the program gets their descriptors."""
    program = (
        "import subprocess, sys\n"
        "from mtp_lightning.command_line.shell import readable_errors\n"
        "with readable_errors(), open(sys.argv[1], 'w') as file:\n"
        "    print('out', sys.stdout.isatty(), sys.stdin.read())\n"
        "    print('error', file=sys.stderr)\n"
        "    subprocess.run(['echo', 'from a child'], check=True)\n"
        "    file.write(str(file.fileno() > 2))\n"
    )
    file = tmp_path / "file"
    for closed in ("<&- >&- 2>&-", ">&-"):
        words = [sys.executable, "-c", program, str(file)]
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *words]
        done = subprocess.run(shell, env=environment(), cwd=ROOT, stdin=subprocess.DEVNULL)
        assert (done.returncode, file.read_text()) == (0, "True"), closed


def test_a_full_disk_names_the_stream() -> None:
    words = [sys.executable, "-c", "from mtp_lightning.console import main; main()", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: <stdout> cannot be used (No space left on device)")


def test_help_into_a_closed_pipe_ends_quietly() -> None:
    words = ["-c", "from mtp_lightning.console import main; main()"]
    assert with_closed_pipe([sys.executable, *words, "--help"]) == (141, "")


@pytest.mark.slow
def test_a_report_is_written_despite_a_closed_pipe(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, loss in (("a", 2.0), ("b", 2.1)):
        write_run(tmp_path / name, {"seed": 0 if name == "a" else 1}, loss=loss)
    result = with_closed_pipe([sys.executable, "-m", "sweeps.report", str(tmp_path)])
    assert result == (0, "")
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_training_and_evaluation_finish_and_generation_ends_quietly(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    code, stderr = with_closed_pipe(command(run_dir, tmp_path / "cache"))
    assert code == 0 and "rror" not in stderr, stderr
    assert (run_dir / "summary.json").is_file()
    numbers = tmp_path / "numbers.json"
    evaluated = [sys.executable, "evaluate.py", f"checkpoint={run_dir}", f"output={numbers}"]
    cache = f"paths.cache_dir={tmp_path / 'cache'}"
    assert with_closed_pipe([*evaluated, cache], both=True)[0] == 0
    assert numbers.is_file()
    text = [sys.executable, "generate.py", f"checkpoint={run_dir}", "prompt=ab", "output=text"]
    assert with_closed_pipe([*text, "max_new_tokens=5"]) == (141, "")

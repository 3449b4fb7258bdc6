"""Turns, workers, measured memory and command lines of benchmarks."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cli, harness

COUNTING = """
def count(task):
    yield {"began": task["first"]}
    for turn in range(task["first"], task["last"]):
        yield {"turn": turn}
    raise ValueError("no more turns")
"""


def test_a_worker_answers_every_turn(tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text(COUNTING)
    options = {"environment": {"PYTHONPATH": str(tmp_path)}}
    with harness.Worker("counting:count", {"first": 3, "last": 5}, **options) as worker:
        assert worker.first == {"began": 3}
        assert [worker.turn() for _ in range(2)] == [{"turn": 3}, {"turn": 4}]
        with pytest.raises(RuntimeError, match="ValueError: no more turns"):
            worker.turn()
    answer = harness.measure_once("counting:count", {"first": 7, "last": 9}, **options)
    assert answer == {"began": 7, "turn": 7}
    sides = {
        n: partial(harness.Worker, "counting:count", {"first": n, "last": 9}, **options)
        for n in (5, 7)
    }
    assert harness.race(sides, 2) == {
        n: [{"began": n, "turn": n}, {"began": n, "turn": n + 1}] for n in (5, 7)
    }


def test_a_worker_that_cannot_start_is_reported() -> None:
    with pytest.raises(RuntimeError, match="No module named 'benchmarks.no_such_module'"):
        harness.Worker("benchmarks.no_such_module:work", {})


def test_sides_take_turns() -> None:
    order: list[str] = []
    sides = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert harness.take_turns(sides, 3) == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert order == list("abbaab")
    assert harness.ratio([2.0, 6.0, 9.0], [1.0, 2.0, 1.0]) == 3
    assert harness.medians([{"x": 1}, {"x": 5}, {"x": 2}]) == {"x": 2}


def test_the_usage_of_a_program_is_its_time_and_memory() -> None:
    script = "x = bytes(100_000_000); sum(range(3_000_000))"
    usage = harness.usage_of([sys.executable, "-c", script])
    assert usage["seconds"] > 0.01 and usage["rss"] > 100e6
    with pytest.raises(RuntimeError, match="NameError"):
        harness.usage_of([sys.executable, "-c", "no_such_name"])


@cli.command(quick={"steps": 2}, choices={"kinds": ["a", "b"]})
def example(
    where: Path,
    /,
    *,
    base: str,
    kinds: Sequence[str] = ("a",),
    sizes: Sequence[int] = (1, 2),
    steps: int = 9,
    wide: bool = True,
    even: bool = False,
    only: str = "",
) -> dict[str, Any]:
    """An example.

    Args:
        where: a place.
        base: a commit,
            on two lines.
        sizes: 100 % of them.
    """
    return {"sizes": list(sizes), "steps": steps, "flags": [wide, even], "only": only}


@cli.command()
def other() -> dict[str, Any]:
    """Another."""
    return {}


def test_parameters_of_a_command_are_its_options(tmp_path, capsys):
    main = cli.program(example, other)
    output = ["--output", str(tmp_path / "new" / "x.json")]
    defaults = main(["there", "--base", "c0ffee", *output])
    assert (defaults["sizes"], defaults["steps"], defaults["flags"]) == ([1, 2], 9, [True, False])
    assert defaults["benchmark"] == "example" and defaults["options"]["where"] == "there"
    assert defaults == json.loads((tmp_path / "new" / "x.json").read_text(encoding="utf-8"))
    assert defaults["machine"]["torch"] == torch.__version__
    typed = ["example", "there", "--base", "c", "--sizes", "3,4", "5", "--no-wide", "--even"]
    result = main([*typed, "--quick", "--only", "x", *output])
    assert (result["sizes"], result["steps"], result["only"]) == ([3, 4, 5], 2, "x")
    assert result["flags"] == [False, True]
    assert main([*typed, "--quick", "--steps", "5", *output])["steps"] == 5
    assert main(["other", *output])["options"] == {}
    for arguments in (["there"], ["there", "--base", "c", "--kinds", "c"], ["other", "--quick"]):
        with pytest.raises(SystemExit):
            main(arguments)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["example", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert "a commit, on two lines" in help_text and "100 % of them; default 1 2" in help_text
    assert "default 9, with --quick 2" in help_text


def test_tables_format_numbers_and_leave_gaps(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "one", "n": 1234.5}, {"name": "two"}]
    cli.print_table("Numbers", "what: name; a number: n ,.0f", rows)
    lines = capsys.readouterr().out.splitlines()
    assert "what" in lines[2] and "a number" in lines[2]
    assert "1,234" in lines[4] and "two" in lines[5]


def test_saved_tensors_counts_every_storage_once() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(8, 4, requires_grad=True)
    with harness.saved_tensors([weight]) as count:
        # x is saved twice and counts once; the weight is excluded; exp keeps its output.
        y = (x @ weight + x.view(4, 8).square().view(8, 4)).exp()
    assert count["peak"] == count["now"] == 4 * 32 + 4 * 32
    y.sum().backward()
    assert count["now"] == 0


def test_peak_memory_includes_memory_that_is_freed() -> None:
    before = harness.current_rss()
    with mmap.mmap(-1, 100_000_000) as block:  # not malloc's, which may have freed memory left
        block.write(bytes([1]) * 100_000_000)
    assert harness.peak_rss() > before + 90e6


def test_peak_memory_of_a_child_excludes_its_parent() -> None:
    assert harness.peak_rss() > 100e6  # this process has torch
    script = "from benchmarks import harness; print(harness.peak_rss())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=harness.ROOT, capture_output=True, text=True, check=True
    )
    assert 1e6 < int(done.stdout) < 60e6


def test_cpu_time_excludes_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set through monkeypatch first, so that it restores both.
    monkeypatch.setenv(harness._CPU_TIME, "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    waiting = {"wait": lambda: time.sleep(0.05)}
    assert harness.median_times(waiting, repeats=1)["wait"] >= 0.05
    threads = torch.get_num_threads()
    try:
        harness.use_cpu_time()
        assert harness.median_times(waiting, repeats=1)["wait"] < 0.04
        assert torch.get_num_threads() == 1
        assert cli.machine()["clock"] == "cpu"
    finally:
        torch.set_num_threads(threads)

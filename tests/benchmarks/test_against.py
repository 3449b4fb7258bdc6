"""The comparison with a commit: ratios over turns, and each side with its own code."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import against, harness


def answers(seconds: list[float], rss: float, result: str) -> list[dict[str, Any]]:
    return [{"seconds": s, "rss": rss, "result": result} for s in seconds]


def test_ratios_are_medians_over_turns() -> None:
    base = answers([1.0, 2.0, 4.0], 50e6, "a")
    row = against.compare("x", {"base": base, "tree": answers([1.1, 1.0, 5.0], 100e6, "a")})
    assert (row["base_ms"], row["tree_ms"]) == (2000, 1100)
    assert (row["ratio"], row["low"], row["high"]) == (1.1, 0.5, 1.25)
    assert (row["base_mb"], row["tree_mb"], row["memory"]) == (50, 100, 2)
    assert row["same"] == "yes"
    different = {"base": answers([1.0], 1e6, "a"), "tree": answers([1.0], 1e6, "b")}
    assert against.compare("x", different)["same"] == "NO"


def test_workloads_have_different_names() -> None:
    tasks = against.workloads()
    assert len(tasks) == 6 + 4 + 4
    assert {task["precision"] for name, (_, task) in tasks.items() if "SmolLM2" in name} == {
        *("fp32", "bf16", "int8")
    }


@pytest.mark.long
def test_an_old_tree_is_measured_with_its_own_code(tmp_path: Path) -> None:
    """The tree gets the files of workers; without its package, nothing can be imported."""
    command = ["git", "archive", "--format=tar", "ed24bd7", "mtp_lightning", "benchmarks", "conf"]
    command += ["data_modules", "sweeps", "hydra_plugins"]
    archive = subprocess.run(command, cwd=harness.ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip("this clone does not have the commit")
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=archive.stdout, check=True)
    against.give_worker_files("ed24bd7", tmp_path)
    task = {"model": "pico", "vocab_size": 50, "depth": 1, "batch_size": 1, "seq_len": 8}
    with harness.Worker("benchmarks.workloads:training", task, tree=tmp_path) as worker:
        assert worker.first["parameters"] > 0
        assert worker.turn()["seconds"] > 0
    task = {"vocab_size": 60, "depth": 2, "precision": "fp32", "batch": 2, "drafts": True}
    task |= {"prompt_tokens": 3, "new_tokens": 5, "overrides": []}
    with harness.Worker("benchmarks.workloads:decoding", task, tree=tmp_path) as worker:
        assert worker.turn()["result"] == worker.first["result"]
    for name in ("mtp_lightning", "data_modules"):
        (tmp_path / name).rename(tmp_path / f"{name}_hidden")
    with pytest.raises(RuntimeError, match="was imported, which is not of|No module named"):
        harness.Worker("benchmarks.workloads:training", task, tree=tmp_path)

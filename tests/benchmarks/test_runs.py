"""The benchmarks of whole runs, of saving and of a GPU, at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checkpoints, gpu, runs


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_startup(tmp_path: Path) -> None:
    output = tmp_path / "startup.json"
    synthetic = ["data=synthetic", "data.source.size=20000", "data.seq_len=32", "data.batch_size=2"]
    result = runs.main(["startup", *synthetic, "--quick", "--output", str(output)])
    assert read(output) == result
    seconds = {row["what"]: row["seconds"] for row in result["rows"]}
    # Python alone takes some hundredths of a second; --help does not wait for torch.
    assert 0.02 < seconds["train.py --help"] < seconds["first step, full cache"]
    assert seconds["first step, full cache"] < seconds["run of one step, full cache"]


def test_validation(tmp_path: Path) -> None:
    output = tmp_path / "validation.json"
    small = ["data.eval_examples=8", "data.batch_size=4", "trainer.accelerator=cpu"]
    result = runs.main(["validation", *small, "--quick", "--output", str(output)])
    assert read(output) == result
    assert sum(row["share"] for row in result["rows"]) == pytest.approx(1)
    assert len(result["rows"]) == 4 and all(row["seconds"] > 0 for row in result["rows"])
    step, *parts = result["rows"]
    assert step["total"] == pytest.approx(5000 * step["seconds"])
    assert [row["total"] / row["seconds"] for row in parts] == pytest.approx([10] * 3)


@pytest.mark.long
def test_gpu_on_a_cpu(tmp_path: Path) -> None:
    """What it measures, at sizes of a CPU; a row that fails costs no other."""
    arguments = ["--device", "cpu", "--rows", "pico:1:2", "nope:0:1", "--vocab-size", "300"]
    small = ["--seq-len", "32", "--steps", "1", "--no-compile", "--no-tests", "--quick"]
    output = tmp_path / "gpu.json"
    result = gpu.main([*arguments, *small, "--output", str(output)])
    assert read(output) == result
    row, failed = result["rows"]
    assert "error" not in row and failed["error"]
    assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["ms"] * 1e3)
    assert row["mfu"] is None and 0 < row["of_matmul"] < 10 and 1 < row["loss"] < 10
    assert len(row["eager"]["verify_ms"]) == 2 and len(row["eager"]["draft_ms"]) == 1
    assert "compiled" not in row
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            gpu.main([])


@pytest.mark.long
def test_both_ways_are_measured(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    result = checkpoints.main(["--megabytes", "48", "--rounds", "1", "--output", str(output)])
    assert read(output) == result
    one, other = result["file"], result["parts"]
    assert 0 < one["waits_s"] == one["named_s"]
    assert 0 < other["waits_s"] < other["named_s"]
    # The first process gathers 48 MB, and copies 24.
    assert one["beside_bytes"] > 40e6 and other["beside_bytes"] > 20e6
    assert other["steps_meanwhile"] > 0

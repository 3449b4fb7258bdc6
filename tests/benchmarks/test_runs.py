"""The benchmarks of whole runs, at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import overhead, runs

TINY = ["model.d_model=8", "model.d_ff=8", "model.n_layers=1", "model.n_heads=1"]
TINY += ["model.n_kv_heads=1", "data.batch_size=2", "data.eval_examples=2"]


def test_overhead_is_a_median_of_ratios() -> None:
    runs = [{"run_ms": [4.0, 6.0], "bare_ms": [2.0, 4.0]}, {"run_ms": [100.0], "bare_ms": [50.0]}]
    row = overhead.beside_loop("none", runs)
    assert (row["ms"], row["bare_ms"], row["ratio"]) == (6, 4, 2)


@pytest.mark.long
def test_overhead(tmp_path: Path) -> None:
    arguments = ["--quick", "--steps", "3", "--cases", "parallel, D=3"]
    output = ["--output", str(tmp_path / "overhead.json")]
    found = overhead.main([*arguments, *output, "--overrides", *TINY])
    (row,) = found["rows"]
    assert row["ms"] * row["steps_per_second"] == pytest.approx(1e3)
    # The run's own work is most of a step of so small a model.
    assert 0.5 < row["ratio"] < 20
    (process,) = found["runs"]["parallel, D=3"]
    assert len(process["run_ms"]) == len(process["bare_ms"]) == 2


@pytest.mark.long
def test_startup(tmp_path: Path) -> None:
    synthetic = ["data=synthetic", "data.source.size=20000", "data.seq_len=32", "data.batch_size=2"]
    output = ["--output", str(tmp_path / "startup.json")]
    result = runs.main(["startup", *synthetic, "--quick", *output])
    seconds = {row["what"]: row["seconds"] for row in result["rows"]}
    # --help does not wait for torch.
    assert 0.02 < seconds["train.py --help"] < seconds["first step, full cache"]
    assert seconds["first step, full cache"] < seconds["run of one step, full cache"]


@pytest.mark.long
def test_validation(tmp_path: Path) -> None:
    small = ["data.eval_examples=8", "data.batch_size=4", "trainer.accelerator=cpu"]
    output = ["--output", str(tmp_path / "validation.json")]
    result = overhead.main(["validation", *small, "--quick", *output])
    assert sum(row["share"] for row in result["rows"]) == pytest.approx(1)
    assert len(result["rows"]) == 4 and all(row["seconds"] > 0 for row in result["rows"])
    step, *parts = result["rows"]
    assert step["total"] == pytest.approx(5000 * step["seconds"])
    assert [row["total"] / row["seconds"] for row in parts] == pytest.approx([10] * 3)


@pytest.mark.long
def test_both_kinds_of_checkpoints(tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "result.json")]
    result = overhead.main(["checkpoints", "--megabytes", "48", "--rounds", "1", *output])
    one, other = result["file"], result["parts"]
    assert 0 < one["waits_s"] == one["named_s"]
    assert 0 < other["waits_s"] < other["named_s"]
    # The first process gathers 48 MB, and copies 24.
    assert one["beside_bytes"] > 40e6 and other["beside_bytes"] > 20e6
    assert other["steps_meanwhile"] > 0

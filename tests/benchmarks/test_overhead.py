"""The benchmark of small steps: its run is a whole one, and its profile adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import overhead

TINY = ["model.d_model=8", "model.d_ff=8", "model.n_layers=1", "model.n_heads=1"]
TINY += ["model.n_kv_heads=1", "data.batch_size=2", "data.eval_examples=2"]


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    output = tmp_path / "overhead.json"
    arguments = ["--quick", "--steps", "3", "--cases", "parallel, D=3", "--profile"]
    found = overhead.main([*arguments, "--output", str(output), "--overrides", *TINY])
    assert json.loads(output.read_text(encoding="utf-8")) == found
    (row,) = found["rows"]
    assert row["code"] == "working tree" and row["speedup"] == 1
    assert row["ms"] * row["steps_per_second"] == pytest.approx(1e3)
    # So small a model leaves the run's own work alone: more than none, and of the same order.
    assert 0.5 < row["ratio"] < 20
    (process,) = found["runs"][0]["runs"]
    assert len(process["run_ms"]) == len(process["bare_ms"]) == 2
    profile = {part["part"]: part["share"] for part in found["profiles"]["parallel, D=3"]}
    assert sum(profile.values()) == pytest.approx(1)
    platform = {"data", "the module's step", "logging", "callbacks", "optimizer", "clipping"}
    layers = {"RMSNorm", "Attention", "Linear of Attention", "Embedding"}
    backward = {f"{layer}, backward" for layer in layers}
    assert platform | layers | backward | {"Lightning", "losses"} <= profile.keys()
    assert all(share > 0 for share in profile.values())


def test_rows_are_medians_and_their_ratios() -> None:
    runs = [
        {"run_ms": [4.0, 6.0], "bare_ms": [2.0, 4.0]},
        {"run_ms": [100.0], "bare_ms": [50.0]},
    ]
    before = overhead.combine("none", "base", runs)
    assert (before["ms"], before["bare_ms"], before["ratio"]) == (6, 4, 2)
    after = overhead.combine("none", "working tree", [{"run_ms": [3.0], "bare_ms": [3.0]}])
    overhead.compare(rows := [before, after])
    assert [row["speedup"] for row in rows] == [1, 2]

"""The benchmark of a GPU, tried on a CPU at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.mark.long
def test_gpu_on_a_cpu(tmp_path: Path) -> None:
    """A row that fails does not stop the others."""
    arguments = ["--device", "cpu", "--rows", "pico:1:2", "nope:0:1", "--vocab-size", "300"]
    small = ["--seq-len", "32", "--steps", "1", "--no-compile", "--no-tests", "--quick"]
    result = gpu.main([*arguments, *small, "--output", str(tmp_path / "gpu.json")])
    row, failed = result["rows"]
    assert "error" not in row and failed["error"]
    assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["ms"] * 1e3)
    assert row["mfu"] is None and 0 < row["of_matmul"] < 10 and 1 < row["loss"] < 10
    assert len(row["eager"]["verify_ms"]) == 2 and len(row["eager"]["draft_ms"]) == 1
    assert "compiled" not in row
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            gpu.main([])

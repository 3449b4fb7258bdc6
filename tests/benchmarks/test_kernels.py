"""The benchmarks of single layers and of the head run at tiny sizes, and can be true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import head, kernels
from mtp_lightning.cpu import library as native


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.long
def test_head(tmp_path: Path) -> None:
    output = tmp_path / "head.json"
    arguments = ["--vocab-sizes", "16384", "--d-model", "8", "--rows", "512", "--repeats", "1"]
    # PyTorch's own chunked function is slow to import at its first call.
    arguments += ["--implementations", "chunked", "whole logits"]
    result = head.main([*arguments, "--chunks", "10,16,17,30", "--output", str(output)])
    assert read(output) == result
    rows = {row["implementation"]: row for row in result["implementations"]}
    assert list(rows) == ["chunked", "whole logits"]
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows["chunked"]["loss"], rel=1e-4)
        assert row["ms"] > 0
    # Whole logits: at least the logits and their gradient. Ours: some chunks' worth, here of a
    # quarter of the rows each.
    logits = rows["whole logits"]["logits_mb"]
    assert logits == pytest.approx(4 * 512 * 16384 / 1e6)
    if not torch.cuda.is_available():
        assert rows["whole logits"]["peak_mb"] > 1.8 * logits
        assert rows["chunked"]["peak_mb"] < 0.6 * rows["whole logits"]["peak_mb"]
    chunks = result["chunks"]
    assert head.loss_module.chunk_rows(4096, torch.device("cpu")) == 512  # as before
    # 2^10 numbers are not a row, so one; 2^30 are more rows than there are.
    assert [row["rows"] for row in chunks] == [1, 4, 8, 512]
    assert sum(row["best"] == "best" for row in chunks) == 1
    assert min(row["over_best"] for row in chunks) == 1


def test_kernels(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    shape = ["--batch-size", "2", "--seq-len", "32", "--repeats", "2"]
    arguments = ["--model", "nano", "--vocab-sizes", "300", *shape, "--output", str(output)]
    result = kernels.main(arguments)
    assert read(output) == result
    assert len(result["linear"]) == 6 * 3
    for row in result["linear"]:
        assert row["ms"] > 0 and row["ms_pytorch"] > 0
        assert row["speedup"] == pytest.approx(row["ms_pytorch"] / row["ms"])
    layers = {row["kernel"]: row for row in result["layers"]}
    names = ["feed-forward layer", "RMSNorm", "SwiGLU", "RoPE and attention", "log-softmax and exp"]
    assert list(layers) == names
    for name in names[:4]:
        row = layers[name]
        assert row["ours_ms"] > 0 and row["over_ours"] == 1
        assert row["over_pytorch"] == pytest.approx(row["pytorch_ms"] / row["ours_ms"])
    swiglu = layers["SwiGLU"]
    if native.library is None:
        assert swiglu["ours_saved_mb"] == swiglu["without_saved_mb"]
    else:  # ours keeps its input only
        assert swiglu["ours_saved_mb"] == pytest.approx(2 * 32 * 512 * 4 / 1e6)
        assert swiglu["pytorch_saved_mb"] > swiglu["ours_saved_mb"]


def test_sides_that_differ_are_refused() -> None:
    sides = {"ours": torch.exp, "pytorch": torch.sin}
    with pytest.raises(AssertionError, match="not close"):
        kernels.time_layer("x", sides, torch.randn(3, requires_grad=True), repeats=1)


@pytest.mark.long
def test_moe(tmp_path: Path) -> None:
    output = tmp_path / "moe.json"
    result = kernels.main(["moe", "--quick", "--sizes", "nano", "--output", str(output)])
    assert read(output) == result
    (row,) = result["rows"]
    assert row["dense_d_ff"] == 3 * 64
    assert row["ratio"] == pytest.approx(row["moe_us_per_token"] / row["dense_us_per_token"])
    # A dense mask over all 16 experts would do 17 / 3 of the work; noise is smaller.
    assert row["ratio"] > 0.5


def test_teachers_of_heads_side_by_side_are_the_same() -> None:
    task = {"vocab_size": 37, "d_model": 16, "depth": 2, "windows": 1}
    together, alone = head.compare_objectives(task, ["kl", head.ALONE], repeats=1)
    assert alone["loss"] == pytest.approx(together["loss"], rel=1e-5)
    assert together["over_first"] == 1 and alone["ms"] > 0

"""Benchmarks of single layers and of the head at tiny sizes give plausible numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import head, kernels
from mtp_lightning.cpu import library as native


@pytest.mark.long
def test_the_head_command_compares_implementations_and_chunks(tmp_path: Path) -> None:
    arguments = ["--vocab-sizes", "16384", "--d-model", "8", "--rows", "512", "--repeats", "1"]
    # PyTorch's own chunked function is slow to import at its first call.
    arguments += ["--implementations", "chunked", "whole logits"]
    result = head.main(
        [*arguments, "--chunks", "10,16,17,30", "--output", str(tmp_path / "x.json")]
    )
    rows = {row["implementation"]: row for row in result["implementations"]}
    assert list(rows) == ["chunked", "whole logits"]
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows["chunked"]["loss"], rel=1e-4)
        assert row["ms"] > 0
    # Whole logits take the logits and their gradient; ours a few chunks of a quarter of the rows.
    logits = rows["whole logits"]["logits_mb"]
    assert logits == pytest.approx(4 * 512 * 16384 / 1e6)
    if not torch.cuda.is_available():
        assert rows["whole logits"]["peak_mb"] > 1.8 * logits
        assert rows["chunked"]["peak_mb"] < 0.6 * rows["whole logits"]["peak_mb"]
    chunks = result["chunks"]
    assert head.loss_module.chunk_rows(4096, torch.device("cpu")) == 512  # restored
    # A chunk of 2^10 numbers is less than a row, so one row; one of 2^30 has all 512 rows.
    assert [row["rows"] for row in chunks] == [1, 4, 8, 512]
    assert sum(row["best"] == "best" for row in chunks) == 1
    assert min(row["over_best"] for row in chunks) == 1


def test_the_kernels_command_compares_layers(tmp_path: Path) -> None:
    shape = ["--batch-size", "2", "--seq-len", "32", "--repeats", "2"]
    arguments = ["--model", "nano", "--vocab-sizes", "300", *shape]
    result = kernels.main([*arguments, "--output", str(tmp_path / "x.json")])
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
def test_the_moe_command_compares_with_a_dense_layer(tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "x.json")]
    (row,) = kernels.main(["moe", "--quick", "--sizes", "nano", *output])["rows"]
    assert row["dense_d_ff"] == 3 * 64
    assert row["ratio"] == pytest.approx(row["moe_us_per_token"] / row["dense_us_per_token"])
    # A dense mask over all 16 experts would do 17 / 3 of the work; noise is smaller.
    assert row["ratio"] > 0.5


def test_teachers_of_parallel_heads_together_or_alone_are_the_same() -> None:
    task = {"vocab_size": 37, "d_model": 16, "depth": 2, "windows": 1}
    together, alone = head.compare_objectives(task, ["kl", head.ALONE], repeats=1)
    assert alone["loss"] == pytest.approx(together["loss"], rel=1e-5)
    assert together["over_first"] == 1 and alone["ms"] > 0

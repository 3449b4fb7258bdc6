"""Every benchmark runs from its command line at tiny sizes, and its numbers can be true."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    common,
    gpu,
    head,
    kernels,
    layer_profile,
    precision,
    startup,
    train_step,
    validation,
)
from mtp_lightning.cpu import library as native

SHAPE = ["--batch-size", "2", "--seq-len", "32"]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_train_step(tmp_path: Path) -> None:
    output = tmp_path / "folder" / "train_step.json"
    arguments = ["--model", "nano", "--vocab-sizes", "300", "--depths", "0,2", *SHAPE]
    result = train_step.main(
        [*arguments, "--steps", "2", "--repeats", "1", "--output", str(output)]
    )
    assert read(output) == result
    plain, deep = result["rows"]
    assert (plain["depth"], deep["depth"]) == (0, 2)
    for row in result["rows"]:
        assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["ms_per_step"] * 1e3)
        assert row["gflops"] == pytest.approx(row["gflop_per_step"] / row["ms_per_step"] * 1e3)
        assert 0 < row["ratio_to_matmul"] < 10 and 0 < row["ratio_to_fastest"] < 10
        assert 1 < row["loss"] < 10
        # The process holds the imports, then the model's state, then the activations.
        assert 50e6 < row["rss_imported"] < row["rss_peak"] < 2e9
        assert row["state_bytes"] == 16 * row["parameters"]
        assert row["beyond_state"] - row["saved_bytes"] == row["transient"]
    # The modules' own costs, by hand: nano's block, a projection of twice the width, three norms.
    block = 96 * (3 + 2 * 1) * 32 + 96 * 96 + 3 * 96 * 256 + 2 * 96
    module = block + 2 * 96 * 96 + 3 * 96
    assert deep["parameters"] - plain["parameters"] == 2 * module
    assert deep["saved_bytes"] > plain["saved_bytes"] > 4 * 2 * 32 * 96
    assert plain["cost_over_share"] == 1 and plain["peak_over_plain_without_own"] == 1
    share = deep["gflop_per_step"] / plain["gflop_per_step"]
    assert 1 < share < 3
    assert deep["cost_over_share"] == pytest.approx(
        deep["ms_per_step"] / plain["ms_per_step"] / share
    )


@pytest.mark.slow
def test_gpu_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        with pytest.raises(SystemExit):
            gpu.main([])
        assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("library", [None, native.library])
def test_profile_of_a_step_adds_up(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", library)
    tiny = {"vocab_size": 300, "depth": 2, "batch_size": 2, "seq_len": 32, "steps": 2}
    step, model, _ = train_step.build_step({"model": "nano", **tiny})
    step()
    rows = layer_profile.measure(step, seconds_per_step=0.5, n_steps=2)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["ms"] for row in rows) == pytest.approx(500)
    by_place = {(row["part"], row["direction"]): row for row in rows}
    kinds = ["linear", "attention", "norm", "embedding"]
    # One call each of attention with rope and of a whole layer, whose products nobody sees.
    kinds += ["feed-forward"] if library else ["rope", "activation"]
    assert {(kind, way) for kind in kinds for way in ("forward", "backward")} <= by_place.keys()
    assert {("head", "both"), ("loss", "both"), ("optimizer", "after")} <= by_place.keys()
    # The work of linear layers and head, by hand: all their matrices, and three passes.
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    matrices -= 300 * 96  # the embedding, tied to the head
    per_block = 2 if library else 4
    if library:
        inside = ("gate_up.weight", "down.weight")
        matrices -= sum(p.numel() for n, p in model.named_parameters() if n.endswith(inside))
    linear = by_place["linear", "forward"]
    assert linear["gflop"] == pytest.approx(2 * 2 * 32 * matrices / 1e9)
    assert by_place["linear", "backward"]["gflop"] == pytest.approx(2 * linear["gflop"])
    assert by_place["head", "both"]["gflop"] == pytest.approx(3 * 3 * 2 * 64 * 96 * 300 / 1e9)
    assert linear["products_ms"] > 0 and linear["operators"] >= 8 * per_block + 2 * (per_block + 1)


@pytest.mark.slow
def test_profile_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"vocab_size": 50, "depth": 1, "batch_size": 1, "seq_len": 16}
    monkeypatch.setitem(train_step.PROFILED, "pico", {**shape, "mtp": "parallel"})
    output = tmp_path / "profile.json"
    arguments = ["--quick", "--profile", "pico", "--threads", "1", "--output", str(output)]
    result = train_step.main(arguments)
    assert read(output) == result
    (found,) = result["profiles"]
    assert found["model"] == "pico" and found["threads"] == 1
    ms = sum(row["ms"] for row in found["rows"])
    assert ms == pytest.approx(found["ms_per_step"])


@pytest.mark.slow
def test_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"vocab_size": 50, "depth": 1, "batch_size": 2, "seq_len": 16}
    monkeypatch.setitem(precision.MODELS, "pico", shape)
    output = tmp_path / "precision.json"
    result = precision.main(["--quick", "--models", "pico", "--output", str(output)])
    assert read(output) == result
    (row,) = result["rows"]
    assert row["tokens_per_second"] * row["ms_bf16"] == pytest.approx(2 * 16 * 1e3)
    assert row["ms_fp32"] > 0 and row["speedup"] > 0


@pytest.mark.slow
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
    # 2^10 numbers are not a row, so one; 2^30 are more rows than there are.
    assert [row["rows"] for row in chunks] == [1, 4, 8, 512]
    assert sum(row["best"] == "best" for row in chunks) == 1
    assert min(row["over_best"] for row in chunks) == 1


def test_head_sweep_restores_the_chunk_size() -> None:
    before = head.through_head.chunk_rows(4096, torch.device("cpu"))
    with head.chunk_numel(4096 * 7, "cpu"):
        assert head.through_head.chunk_rows(4096, torch.device("cpu")) == 7
    assert head.through_head.chunk_rows(4096, torch.device("cpu")) == before


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_by_child = []

    def in_this_process(module: str, task: dict) -> dict:
        # test_train_step has real children; the allocator of this process stays as it is.
        assert module == train_step.MODULE
        kept_by_child.append(task["keep_freed_memory"])
        return train_step.measure({**task, "keep_freed_memory": False})

    monkeypatch.setattr(common, "run_child", in_this_process)
    output = tmp_path / "kernels.json"
    arguments = ["--model", "nano", "--vocab-sizes", "300", "--depth", "1", *SHAPE, "--quick"]
    result = kernels.main([*arguments, "--repeats", "2", "--output", str(output)])
    assert read(output) == result
    assert len(result["linear"]) == 6 * 3
    assert [row["kernel"] for row in result["layers"]] == [
        "RMSNorm",
        "SwiGLU",
        "RoPE",
        "causal attention",
    ]
    own = ["feed-forward layer", "RMSNorm", "SwiGLU", "RoPE and attention", "log-softmax and exp"]
    assert [row["kernel"] for row in result["native"]] == (own if native.library else [])
    for row in result["linear"] + result["layers"] + result["native"][:4]:
        assert row["ms"] > 0 and row["ms_pytorch"] > 0
        assert row["speedup"] == pytest.approx(row["ms_pytorch"] / row["ms"])
    swiglu = result["layers"][1]
    # Ours keeps its input only.
    assert swiglu["saved_mb"] == pytest.approx(2 * 32 * 512 * 4 / 1e6)
    assert swiglu["saved_mb_pytorch"] > swiglu["saved_mb"]
    assert kept_by_child == [True, False]
    kept, given_back = result["freed_memory"]
    assert given_back["speedup"] == 1 and kept["speedup"] == given_back["ms"] / kept["ms"]


@pytest.mark.slow
def test_startup(tmp_path: Path) -> None:
    output = tmp_path / "startup.json"
    synthetic = ["data=synthetic", "data.source.size=20000", "data.seq_len=32", "data.batch_size=2"]
    result = startup.main(["--quick", "--output", str(output), *synthetic])
    assert read(output) == result
    seconds = {row["what"]: row["seconds"] for row in result["rows"]}
    # Python alone takes some hundredths of a second; --help does not wait for torch.
    assert 0.02 < seconds["train.py --help"] < seconds["first step, full cache"]
    assert seconds["first step, full cache"] < seconds["run of one step, full cache"]


def test_validation(tmp_path: Path) -> None:
    output = tmp_path / "validation.json"
    small = ["data.eval_examples=8", "data.batch_size=4", "trainer.accelerator=cpu"]
    result = validation.main(["--quick", "--output", str(output), *small])
    assert read(output) == result
    assert sum(row["share"] for row in result["rows"]) == pytest.approx(1)
    assert len(result["rows"]) == 4 and all(row["seconds"] > 0 for row in result["rows"])
    step, *parts = result["rows"]
    assert step["total"] == pytest.approx(5000 * step["seconds"])
    assert [row["total"] / row["seconds"] for row in parts] == pytest.approx([10] * 3)


def test_saved_tensors_counts_every_storage_once() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(8, 4, requires_grad=True)
    counter = common.SavedTensors([weight])
    with counter.counting():
        # x is saved twice and counts once; the weight is excluded; exp keeps its output.
        y = (x @ weight + x.view(4, 8).square().view(8, 4)).exp()
    assert counter.n_bytes == 4 * 32 + 4 * 32
    y.sum().backward()


def test_peak_memory_outlives_its_cause() -> None:
    before = common.current_rss()
    with mmap.mmap(-1, 100_000_000) as block:  # not malloc's, which may have freed memory left
        block.write(bytes([1]) * 100_000_000)
    assert common.peak_rss() > before + 90e6


def test_peak_memory_is_not_the_parents() -> None:
    assert common.peak_rss() > 100e6  # this process has torch
    script = "from benchmarks import common; print(common.peak_rss())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=common.ROOT, capture_output=True, text=True, check=True
    )
    assert 1e6 < int(done.stdout) < 60e6


def test_a_failed_child_is_reported() -> None:
    with pytest.raises(RuntimeError, match="No module named benchmarks.no_such_module"):
        common.run_child("benchmarks.no_such_module", {})


def test_cpu_time_leaves_out_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that monkeypatch puts both back as they were.
    monkeypatch.setenv(common._CPU_TIME, "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    waiting = {"wait": lambda: time.sleep(0.05)}
    assert common.median_times(waiting, repeats=1)["wait"] >= 0.05
    threads = torch.get_num_threads()
    try:
        common.use_cpu_time()
        assert common.median_times(waiting, repeats=1)["wait"] < 0.04
        assert torch.get_num_threads() == 1
        assert common.machine()["clock"] == "cpu"
    finally:
        torch.set_num_threads(threads)

"""The commands of benchmarks/ at tiny sizes, and how they combine measurements."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu, harness, llama_cpp, overhead, peers, rounds, runs, serve
from data_modules.tokenizers import ByteTokenizer
from tests.decoding.models import small_model
from tests.integration.helpers import train_here
from tests.models import checkpoint_of

TINY = ["model.d_model=8", "model.d_ff=8", "model.n_layers=1", "model.n_heads=1"]
TINY += ["model.n_kv_heads=1", "data.batch_size=2", "data.eval_examples=2"]


def test_overhead_is_a_median_of_ratios() -> None:
    runs = [{"run_ms": [4.0, 6.0], "bare_ms": [2.0, 4.0]}, {"run_ms": [100.0], "bare_ms": [50.0]}]
    row = overhead.beside_loop("none", runs)
    assert (row["ms"], row["bare_ms"], row["ratio"]) == (6, 4, 2)


@pytest.fixture
def output(tmp_path: Path) -> list[str]:
    """The option with the file of results."""
    return ["--output", str(tmp_path / "result.json")]


@pytest.mark.long
def test_the_overhead_command_compares_a_run_with_a_bare_loop(output: list[str]) -> None:
    arguments = ["--quick", "--steps", "3", "--cases", "parallel, D=3"]
    result = overhead.main([*arguments, *output, "--overrides", *TINY])
    (row,) = result["rows"]
    assert row["ms"] * row["steps_per_second"] == pytest.approx(1e3)
    # The run's own work is most of a step of so small a model.
    assert 0.5 < row["ratio"] < 20
    (process,) = result["runs"]["parallel, D=3"]
    assert len(process["run_ms"]) == len(process["bare_ms"]) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_parts_of_a_round_sum_to_it(temperature, tmp_path, output, monkeypatch):
    for name in (harness._CPU_TIME, "OMP_NUM_THREADS"):  # the command sets them
        monkeypatch.setenv(name, "")
    stored = checkpoint_of(small_model(0, 2, vocab=257))
    stored |= {"tokenizer": ByteTokenizer().state(), "config": {"data": {"seq_len": 64}}}
    torch.save(stored, tmp_path / "run.ckpt")
    options = ["--quick", "--draft-vocab", "64", "--temperature", str(temperature)]
    result = rounds.main([str(tmp_path / "run.ckpt"), *options, *output])
    for way in ("plain", "with drafts"):
        *parts, whole = [row for row in result["rows"] if row["way"] == way]
        assert whole["part"] == "the round" and whole["ms"] > 0
        assert sum(row["ms"] for row in parts) == pytest.approx(whole["ms"])
        assert sum(row["share"] for row in parts) == pytest.approx(1)
        assert ("draft: the module and its head" in {row["part"] for row in parts}) == (
            way != "plain"
        )
    names = [row["part"] for row in result["passes"]]
    assert "trunk, 3 tokens" in names and "draft, head of 64 tokens, reads 2" in names


@pytest.mark.long
def test_the_startup_command_times_each_stage(output: list[str]) -> None:
    synthetic = ["data=synthetic", "data.source.size=20000", "data.seq_len=32", "data.batch_size=2"]
    result = runs.main(["startup", *synthetic, "--quick", *output])
    seconds = {row["what"]: row["seconds"] for row in result["rows"]}
    # --help does not wait for torch.
    assert 0.02 < seconds["train.py --help"] < seconds["first step, full cache"]
    assert seconds["first step, full cache"] < seconds["run of one step, full cache"]


@pytest.mark.long
def test_the_validation_command_adds_up(output: list[str]) -> None:
    small = ["data.eval_examples=8", "data.batch_size=4", "trainer.accelerator=cpu"]
    result = overhead.main(["validation", *small, "--quick", *output])
    assert sum(row["share"] for row in result["rows"]) == pytest.approx(1)
    assert len(result["rows"]) == 4 and all(row["seconds"] > 0 for row in result["rows"])
    step, *parts = result["rows"]
    assert step["total"] == pytest.approx(5000 * step["seconds"])
    assert [row["total"] / row["seconds"] for row in parts] == pytest.approx([10] * 3)


@pytest.mark.long
def test_checkpoints_in_one_file_and_in_parts_are_measured(output: list[str]) -> None:
    result = overhead.main(["checkpoints", "--megabytes", "48", "--rounds", "1", *output])
    file, parts = result["file"], result["parts"]
    assert 0 < file["waits_s"] == file["named_s"]
    assert 0 < parts["waits_s"] < parts["named_s"]
    # The first process gathers 48 MB, and copies 24.
    assert file["beside_bytes"] > 40e6 and parts["beside_bytes"] > 20e6
    assert parts["steps_meanwhile"] > 0


@pytest.mark.long
def test_the_gpu_command_runs_on_a_cpu(output: list[str]) -> None:
    """A failed row does not stop the others."""
    arguments = ["--device", "cpu", "--rows", "pico:1:2", "nope:0:1", "--vocab-size", "300"]
    small = ["--seq-len", "32", "--steps", "1", "--no-compile", "--no-tests", "--quick"]
    row, failed = gpu.main([*arguments, *small, *output])["rows"]
    assert "error" not in row and failed["error"]
    assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["ms"] * 1e3)
    assert row["mfu"] is None and 0 < row["of_matmul"] < 10 and 1 < row["loss"] < 10
    assert len(row["eager"]["verify_ms"]) == 2 and len(row["eager"]["draft_ms"]) == 1
    assert "compiled" not in row
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            gpu.main([])


def test_training_steps_are_compared_with_the_best_peer() -> None:
    times = {"ours": [9.0, 1.0, 2.0], "transformers": [4.0, 5.0, 9.0], "litgpt": [3.0, 3.0, 0.1]}
    facts = {"rss": 3e6, "loss": 1.0, "parameters": 2}
    row = peers.compare_steps(
        {n: [{"seconds": x, **facts} for x in own] for n, own in times.items()}
    )
    assert (row["ours_ms"], row["transformers_ms"], row["litgpt_ms"]) == (2000, 5000, 3000)
    assert row["times_the_best"] == 1.5
    assert row["ours_tokens_per_second"] == pytest.approx(8 * 256 / 2)
    assert (row["litgpt_peak_mb"], row["litgpt_parameters"]) == (3, 2)


@pytest.mark.extras
def test_the_server_is_measured_with_and_without_drafts(tmp_path, output):
    train_here(tmp_path / "mine", tmp_path / "cache", {"data.seq_len": 64})
    sizes = ["--clients=1,2", "--requests=4", "--turns=1", "--tokens=3"]
    result = serve.main(["--checkpoint", str(tmp_path / "mine"), *sizes, *output])
    assert result["same_texts"] is True
    assert [(row["way"], row["clients"]) for row in result["rows"]] == [
        *(("speculative", 1), ("plain", 1), ("speculative", 2), ("plain", 2))
    ]
    for row in result["rows"]:
        assert 0 < row["requests_per_second"] <= row["tokens_per_second"]
        assert row["way"] != "plain" or row["speedup"] == 1
        assert row["clients"] != 1 or row["against_one"] == 1


@pytest.mark.extras
def test_llama_cpp_is_measured_next_to_this_project(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs pip install -e '.[engines]'")
    pytest.importorskip("gguf")
    from tests.interop.gguf_files import write_gguf

    file = write_gguf(tmp_path / "small.gguf")
    task = {"model": str(file), "threads": 1, "batch": 2, "new_tokens": 8}
    task["prompts"] = [[5, 6, 7, 8], [9, 10, 11, 12]]
    # Several texts are decoded by this environment's xllamacpp.
    options = {"precisions": ("fp32", "int8"), "turns": 1, "python": "native/bin/python"}
    rows = llama_cpp.measure(task, heads="", **options)
    assert [row["side"].split()[0] for row in rows] == ["xllamacpp", "plain,", "plain,"]
    for row in rows:
        assert row["megabytes"] > 10 and row["prompt_tokens_per_second"] > 0
    assert rows[0]["over"] == rows[0]["prompt_over"] == 1


@pytest.mark.extras
def test_an_interpreter_without_llama_cpp_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    from tests.interop.gguf_files import write_gguf

    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    model = str(write_gguf(tmp_path / "small.gguf"))
    for path in (python, tmp_path / "nowhere"):
        with pytest.raises(SystemExit):
            llama_cpp.main([model, f"--python={path}"])
        message = f"error: {path} is not a Python that has llama-cpp-python: install it there."
        assert message in capsys.readouterr().err


def test_a_users_mistake_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        rounds.main(["nowhere"])
    message = "error: There is no checkpoint or run folder at nowhere.\n"
    assert ended.value.code == 1 and capsys.readouterr().err == message

"""Tests a GPU's arithmetic on this machine, and measures its speed.

    python -m benchmarks.gpu

It is meant to take nine minutes on one GPU of 80 GB; no GPU has run it yet. First come the tests
with the marker ``gpu``, then optimizer steps of three sizes at D = 0, 1, 2 and of a mixture of
experts, with the defaults of a run on a GPU (bf16-mixed, compiled blocks) and without Lightning,
callbacks and logging; then the passes of decoding, with weights in bf16; last those of one model
compiled and recorded. ``mfu`` is relative to the maker's number for dense products, and counts
attention in full, without a causal discount. Rows for which no time is left are named.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import cli, harness
from benchmarks.harness import Row

# MODEL:D:WINDOWS of a step, the most informative ones first.
ROWS = (
    *("medium:2:8", "medium:0:8", "small:0:16", "small:2:16", "large:0:4", "large:1:4"),
    *("deepseek_small:1:8", "medium:1:8", "small:1:16", "large:2:4"),
)
_WARMUP_STEPS = 3


def measure(task: Row) -> Iterator[Row]:
    """A configuration: milliseconds of a step and of decoding passes, rates, memory in bytes.

    The task is that of ``build_step`` with options of the command; with ``passes_alone``, only
    compiled decoding passes are measured.
    """
    import torch

    from benchmarks.workloads import build_step, timed_steps
    from mtp_lightning.callbacks.device_rate import measure_matmul_rate, peak_of

    device = torch.device(task["device"])
    built = build_step(task)
    model, step = built.model, torch.autocast(device.type, torch.bfloat16)(built.step)
    yield {}
    if task["passes_alone"]:
        yield {"compiled": _passes(model, task, compile=True)}
        return
    if task["compile"]:
        model.compile_blocks()

    first = harness.seconds_of(lambda: [step() for _ in range(_WARMUP_STEPS)])
    # The host runs ahead of the device within a turn, as it does between two logged rows.
    turns = [turn["seconds"] for turn in itertools.islice(timed_steps(step, task), 3)]
    loss, seconds = float(step()), statistics.median(turns)
    tokens = task["batch_size"] * task["seq_len"]
    flops = built.flops_per_token * tokens
    peak = peak_of(device, torch.bfloat16)
    rate = measure_matmul_rate(device, torch.bfloat16)
    on_gpu = device.type == "cuda"
    yield {
        "loss": loss,
        "parameters": model.config.num_params(),
        "ms": seconds * 1e3,
        "ms_fastest": min(turns) * 1e3,
        "ms_slowest": max(turns) * 1e3,
        "seconds_to_start": first,
        "tokens_per_second": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": None if peak is None else flops / seconds / peak,
        "of_matmul": flops / seconds / rate.fastest,
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None,
        "eager": _passes(model, task, compile=False),
    }


def _passes(model: Any, task: Row, *, compile: bool) -> dict[str, list[float]]:
    """Milliseconds of every pass of decoding, on a GPU with weights in bf16."""
    from mtp_lightning.decoding.measure import pass_costs

    model.eval().requires_grad_(False)
    if task["device"] == "cuda":
        model.bfloat16()
    costs = pass_costs(model, range(1, 65), compile=compile, repeats=task["repeats"])
    return {
        "verify_ms": [seconds * 1e3 for seconds in costs.verify],
        "draft_ms": [seconds * 1e3 for seconds in costs.draft],
    }


def run_gpu_tests(seconds: float) -> Row:
    """Run the tests with the marker ``gpu``; returns their end and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "tests"]
    options: Row = {"cwd": harness.ROOT, "capture_output": True, "text": True, "timeout": seconds}
    try:
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return {"returncode": None, "last_line": f"not done after {seconds:.0f} s"}
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"returncode": done.returncode, "last_line": lines[-1], "failed": failed}


@cli.command(quick={"repeats": 5})
def gpu(
    rows: Sequence[str] = ROWS,
    compiled: str = "small:2:1",
    seq_len: int = 2048,
    vocab_size: int = 32_768,
    steps: int = 10,
    repeats: int = 30,
    minutes: float = 8.5,
    device: str = "cuda",
    compile: bool = True,
    tests: bool = True,
) -> Row:
    """Tests, steps and passes, while there is time.

    Args:
        rows: MODEL:DEPTH:WINDOWS, the most informative ones first.
        compiled: the row whose decoding passes are compiled, after all others.
        steps: steps in each of three turns.
        repeats: timed calls of each decoding pass.
        minutes: no row starts later than this.
        device: ``cpu`` tries the program without a GPU, at small sizes.
        compile: leave blocks and passes as they are.
        tests: leave out the tests.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; --device cpu tries the program at small sizes")
    began, limit, tested = time.monotonic(), minutes * 60, None
    if tests:
        harness.progress("tests with the marker gpu")
        tested = run_gpu_tests(limit / 2)
        harness.progress(tested["last_line"])
    found, longest = [], 0.0
    for text, alone in [*((row, False) for row in rows), *([(compiled, True)] if compile else [])]:
        model, depth, batch_size = text.split(":")
        row = {"model": model, "depth": int(depth), "batch_size": int(batch_size)}
        if limit - (time.monotonic() - began) < longest:
            found.append({**row, "error": "no time left"})
            continue
        harness.progress(f"{text}, {'compiled passes' if alone else 'steps and passes'}")
        task = {**row, "seq_len": seq_len, "vocab_size": vocab_size, "steps": steps}
        task |= {"device": device, "compile": compile, "passes_alone": alone, "repeats": repeats}
        started = time.monotonic()
        try:
            found.append(row | harness.measure_once(measure, task))
        except RuntimeError as error:  # such as out of memory, which does not stop the others
            found.append({**row, "error": str(error).strip().splitlines()[-1][:200]})
        longest = max(longest, time.monotonic() - started)
    print_tables(found, f"windows of {seq_len:,}, bf16-mixed, {'compiled' if compile else 'eager'}")
    return {"tests": tested, "rows": found, "minutes": (time.monotonic() - began) / 60}


def print_tables(rows: list[Row], how: str) -> None:
    """The steps, then the passes of decoding."""
    cli.print_table(
        f"Optimizer step, {how} blocks",
        "model: model; D: depth; windows: batch_size; parameters: parameters ,; ms: ms .1f; "
        "min: ms_fastest .1f; max: ms_slowest .1f; tokens/s: tokens_per_second ,.0f; "
        "TFLOP/s: tflops .1f; MFU: mfu .3f; of matmul: of_matmul .3f; GB: peak_gb .1f; "
        "start s: seconds_to_start .0f; : error",
        [row for row in rows if "compiled" not in row],
    )
    passes = [
        {
            "model": row["model"],
            "depth": row["depth"],
            "way": way,
            "one": row[way]["verify_ms"][0],
            "all": row[way]["verify_ms"][-1],
            "draft": statistics.mean(row[way]["draft_ms"]) if row[way]["draft_ms"] else None,
        }
        for row in rows
        for way in ("eager", "compiled")
        if way in row
    ]
    cli.print_table(
        "Decoding, one prompt: milliseconds a pass",
        "model: model; D: depth; passes: way; plain: one .2f; verify D drafts: all .2f; "
        "draft: draft .2f",
        passes,
    )


main = cli.program(gpu)


if __name__ == "__main__":
    main()

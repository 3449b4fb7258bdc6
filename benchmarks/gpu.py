"""What a GPU makes of the platform: is it right, and how fast?

Run ``python -m benchmarks.gpu``: under nine minutes on one GPU of 80 GB. First the tests with the
marker ``gpu``; then optimizer steps of three sizes at D = 0, 1, 2 and of a mixture of experts, as a
run takes them by default there (bf16-mixed, compiled blocks), without Lightning, callbacks and
logging; then the passes that decoding consists of, with weights in bf16, and those of one model
compiled and recorded. ``mfu`` is over the maker's number for dense products, and counts attention
in full, without a causal discount. Rows for which no time is left are named in the table and in the
JSON. Not run on a GPU by this project yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks import common

MODULE = "benchmarks.gpu"
# Model, D, windows of SEQ_LEN tokens in a step; the rows that say most come first.
ROWS = [
    ("medium", 2, 8),
    ("medium", 0, 8),
    ("small", 0, 16),
    ("small", 2, 16),
    ("large", 0, 4),
    ("large", 1, 4),
    ("deepseek_small", 1, 8),
    ("medium", 1, 8),
    ("small", 1, 16),
    ("large", 2, 4),
]
# The row whose passes of decoding are measured compiled, too, after all others: five programs.
COMPILED = ("small", 2, 1)
SEQ_LEN = 2048
VOCAB_SIZE = 32_768
_WARMUP_STEPS = 3


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One configuration in this process.

    Args:
        task: ``model``, ``depth``, ``batch_size``, ``seq_len``, ``vocab_size``, ``steps``,
            ``device``, ``compile``, ``repeats``: timed calls of each decoding pass, and
            ``passes_alone``: whether to measure these alone, compiled.

    Returns:
        Milliseconds of a step, the rates that follow, bytes of memory, milliseconds of passes.
    """
    import torch

    from benchmarks.train_step import build_step
    from mtp_lightning.callbacks.device_rate import measure_matmul_rate, peak_of

    device = torch.device(task["device"])
    step, model, _ = build_step(task)
    if task["passes_alone"]:
        return {"compiled": _passes(model, task, compile=True)}
    if task["compile"]:
        model.compile_blocks()

    def timed(n: int) -> float:
        began = time.perf_counter()
        for _ in range(n):
            with torch.autocast(device.type, torch.bfloat16):
                step()
        common.synchronize()
        return time.perf_counter() - began

    first = timed(_WARMUP_STEPS)
    # The steps of a turn run ahead of the device, as those between two logged rows do.
    turns = [timed(task["steps"]) / task["steps"] for _ in range(3)]
    with torch.autocast(device.type, torch.bfloat16):
        loss = float(step())
    seconds = statistics.median(turns)
    tokens = task["batch_size"] * task["seq_len"]
    flops = task["flops_per_token"] * tokens
    peak = peak_of(device, torch.bfloat16)
    rate = measure_matmul_rate(device, torch.bfloat16)
    gpu = device.type == "cuda"
    result = {
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
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if gpu else None,
    }
    return result | {"eager": _passes(model, task, compile=False)}


def _passes(model: Any, task: dict[str, Any], *, compile: bool) -> dict[str, list[float]]:
    """Milliseconds of every pass of decoding; on a GPU with weights in bf16."""
    from mtp_lightning.decoding.measure import pass_costs

    model.eval().requires_grad_(False)
    if task["device"] == "cuda":
        model.bfloat16()
    costs = pass_costs(model, range(1, 65), compile=compile, repeats=task["repeats"])
    return {
        "verify_ms": [seconds * 1e3 for seconds in costs.verify],
        "draft_ms": [seconds * 1e3 for seconds in costs.draft],
    }


def run_gpu_tests(seconds: float) -> dict[str, Any]:
    """The tests with the marker ``gpu``: how they ended, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "tests"]
    try:
        done = subprocess.run(
            command, cwd=common.ROOT, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"returncode": None, "last_line": f"not done after {seconds:.0f} s"}
    lines = (done.stdout + done.stderr).strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "returncode": done.returncode,
        "last_line": lines[-1] if lines else "",
        "failed": failed,
    }


def parse_row(text: str) -> tuple[str, int, int]:
    """``medium:2:8`` -> a row of :data:`ROWS`."""
    try:
        model, depth, batch_size = text.split(":")
        return model, int(depth), int(batch_size)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not MODEL:DEPTH:BATCH") from error


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Tests, measures, prints the tables, writes the JSON and returns it."""
    began = time.monotonic()
    parser = common.parser("Checks and measures a GPU.", "gpu")
    parser.add_argument("--rows", nargs="+", type=parse_row, default=ROWS, help="MODEL:DEPTH:BATCH")
    parser.add_argument("--compiled", type=parse_row, default=COMPILED, help="its passes, compiled")
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--steps", type=int, default=10, help="in each of three turns")
    parser.add_argument("--minutes", type=float, default=8.5, help="no row starts later")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--no-compile", action="store_true", help="eager blocks")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    options = parser.parse_args(arguments)
    if options.child:
        result = measure(json.loads(options.child))
        common.answer_parent(result)
        return result
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the program at small sizes")
    limit = options.minutes * 60
    tests = None
    if not options.no_tests:
        common.progress("tests with the marker gpu")
        tests = run_gpu_tests(limit / 2)
        common.progress(tests["last_line"])
    rows, longest = [], 0.0
    compiled = [] if options.no_compile else [(*options.compiled, True)]
    for model, depth, batch_size, alone in [*((*row, False) for row in options.rows), *compiled]:
        row = {"model": model, "depth": depth, "batch_size": batch_size}
        left = limit - (time.monotonic() - began)
        if left < longest:
            rows.append({**row, "error": "no time left"})
            continue
        what = "compiled passes" if alone else f"{batch_size} x {options.seq_len}"
        common.progress(f"{model} D={depth}, {what}")
        task = {
            **row,
            "seq_len": options.seq_len,
            "vocab_size": options.vocab_size,
            "steps": options.steps,
            "device": options.device,
            "compile": not options.no_compile,
            "passes_alone": alone,
            "repeats": 5 if options.quick else 30,
        }
        started = time.monotonic()
        try:
            rows.append(row | common.run_child(MODULE, task))
        except RuntimeError as error:  # out of memory, say: the other rows are worth having
            rows.append({**row, "error": str(error).strip().splitlines()[-1][:200]})
        longest = max(longest, time.monotonic() - started)
    result = {
        "benchmark": "gpu",
        "device": options.device,
        "seq_len": options.seq_len,
        "vocab_size": options.vocab_size,
        "compile": not options.no_compile,
        "tests": tests,
        "rows": rows,
        "minutes": (time.monotonic() - began) / 60,
        "machine": common.machine(),
    }
    print_tables(result)
    common.write_json(result, options.output)
    return result


def print_tables(result: dict[str, Any]) -> None:
    """The steps, then the passes of decoding."""
    rows = result["rows"]
    how = "compiled" if result["compile"] else "eager"
    common.print_table(
        f"Optimizer step, windows of {result['seq_len']:,}, bf16-mixed, {how} blocks",
        {
            "model": "model",
            "D": "depth",
            "windows": "batch_size",
            "parameters": "parameters|,",
            "ms": "ms|.1f",
            "min": "ms_fastest|.1f",
            "max": "ms_slowest|.1f",
            "tokens/s": "tokens_per_second|,.0f",
            "TFLOP/s": "tflops|.1f",
            "MFU": "mfu|.3f",
            "of matmul": "of_matmul|.3f",
            "GB": "peak_gb|.1f",
            "start s": "seconds_to_start|.0f",
            "": "error",
        },
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
    common.print_table(
        "Decoding, one prompt: milliseconds a pass",
        {
            "model": "model",
            "D": "depth",
            "passes": "way",
            "plain": "one|.2f",
            "verify D drafts": "all|.2f",
            "draft": "draft|.2f",
        },
        passes,
    )


if __name__ == "__main__":
    main()

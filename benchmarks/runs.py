"""Measures the start of a run, and compares ways to set one up.

python -m benchmarks.runs startup     until --help, and until the first optimizer step
python -m benchmarks.runs threads     steps per second by threads, next to busy processes
python -m benchmarks.runs main_job    tokenizers, shapes and depths at equal time
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks import cli, harness
from benchmarks.harness import Row

TRAIN = str(harness.ROOT / "train.py")


def seconds_of_help() -> float:
    """Wall time of ``python train.py --help``."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, TRAIN, "--help"], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode or "mtp.depth" not in done.stdout:
        raise RuntimeError(f"train.py --help failed:\n{done.stdout}{done.stderr}"[-4000:])
    return seconds


def seconds_to_first_step(folder: Path, name: str, overrides: Sequence[str]) -> Row:
    """Wall time from the start of a training process to its first step, and to its end. The run,
    of a new name, and its cache lie in ``folder``.

    Raises:
        RuntimeError: the run failed, or printed no step.
    """
    command = [
        sys.executable,
        TRAIN,
        "model=nano",
        "trainer.max_steps=1",
        "data.eval_bytes=1",
        f"run_dir={folder / name}",
        f"paths.cache_dir={folder / 'cache'}",
        *overrides,
    ]
    first, printed = None, []
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if first is None and line.startswith("step 1/"):
                first = time.perf_counter() - began
    whole = time.perf_counter() - began
    if process.returncode or first is None:
        raise RuntimeError(f"{' '.join(command)} failed:\n{''.join(printed)}"[-4000:])
    return {"first_step": first, "whole_run": whole}


@cli.command(quick={"repeats": 1})
def startup(overrides: Sequence[str] = (), /, repeats: int = 5) -> Row:
    """Until ``train.py --help`` and the first optimizer step.

    The step is that of ``model=nano`` and its default data, in a cache folder of its own: first
    empty, so that tokenizer and token store are built, then filled.

    Args:
        overrides: overrides of the config, for the first step.
    """
    harness.progress("train.py --help")
    helps = [seconds_of_help() for _ in range(repeats)]
    with tempfile.TemporaryDirectory(prefix="mtp-bench-") as name:
        harness.progress("first step, empty cache")
        cold = seconds_to_first_step(Path(name), "cold", overrides)
        harness.progress("first step, full cache")
        warm = [seconds_to_first_step(Path(name), f"warm-{i}", overrides) for i in range(repeats)]
    times = {
        "train.py --help": (helps, 1.5),
        "first step, full cache": ([run["first_step"] for run in warm], 20.0),
        "first step, empty cache": ([cold["first_step"]], None),
        "run of one step, full cache": ([run["whole_run"] for run in warm], None),
    }
    rows = [
        {"what": what, "aim": aim, "seconds": statistics.median(seconds)}
        | {"fastest": min(seconds), "slowest": max(seconds)}
        for what, (seconds, aim) in times.items()
    ]
    cli.print_table(
        "Seconds of waiting, model=nano",
        "for: what; median: seconds .2f; min: fastest .2f; max: slowest .2f; aim: aim .1f",
        rows,
    )
    return {"rows": rows}


# Name of a row of ``threads`` -> runs at once, threads of each, and how OpenMP's threads wait.
THREADS: dict[str, tuple[int, int, dict[str, str]]] = {
    "1 thread": (1, 1, {}),
    "2 threads": (1, 2, {}),
    "2 threads, short spin": (1, 2, {"GOMP_SPINCOUNT": "10000"}),
    "2 threads, passive": (1, 2, {"OMP_WAIT_POLICY": "passive"}),
    "2 runs of 1 thread": (2, 1, {}),
}


@cli.command(quick={"rounds": 1})
def threads(neighbors: Sequence[int] = (0, 1, 2), rounds: int = 5, seconds: float = 5.0) -> Row:
    """Steps per second of ``model=nano`` by threads, and by how OpenMP's threads wait.

    Args:
        neighbors: numbers of busy processes next to it.
        seconds: seconds of steps a turn.
    """
    rows = [row for n in neighbors for row in next_to(n, rounds=rounds, seconds=seconds)]
    cli.print_table(
        "Training steps per second of model=nano",
        "neighbors: neighbors d; threads: name; steps/s: steps_per_second .2f; "
        "over one thread: over_one_thread .2f",
        rows,
    )
    return {"rows": rows}


def next_to(neighbors: int, *, rounds: int, seconds: float) -> list[Row]:
    """The rows of ``threads`` next to so many processes that never wait."""
    from benchmarks.workloads import MODELS, training

    task = {"model": "nano", **MODELS["nano"], "batch_size": 16, "seconds": seconds}

    def steps_per_second(workers: list[harness.Worker], pool: ThreadPoolExecutor) -> float:
        return sum(1 / answer["seconds"] for answer in pool.map(harness.Worker.turn, workers))

    with ExitStack() as stack:
        for _ in range(neighbors):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(busy.wait)
            stack.callback(busy.kill)
        turns = {}
        for name, (runs, n, waiting) in THREADS.items():
            own = {"OMP_NUM_THREADS": str(n), "MKL_NUM_THREADS": str(n), **waiting}
            workers = [
                stack.enter_context(harness.Worker(training, task, environment=own))
                for _ in range(runs)
            ]
            pool = stack.enter_context(ThreadPoolExecutor(runs))
            turns[name] = partial(steps_per_second, workers, pool)
        rates = harness.take_turns(turns, rounds, say=f"next to {neighbors} busy processes")
    return [
        {"neighbors": neighbors, "name": name, "rounds": own}
        | {"steps_per_second": statistics.median(own)}
        | {"over_one_thread": harness.ratio(own, rates["1 thread"])}
        for name, own in rates.items()
    ]


_WIDE = ["model.d_model=128", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=384"]
_USUAL = ["model.n_layers=4", *_WIDE]
# Name of a row of ``main_job`` -> overrides.
MAIN_JOBS: dict[str, list[str]] = {
    "byte, 128 x 4": ["tokenizer=byte", *_USUAL],
    "4,096 ids, 128 x 4": ["tokenizer.vocab_size=4096", *_USUAL],
    "1,024 ids, 128 x 4": _USUAL,
    "1,024 ids, 128 x 4, 8 windows per step": ["data.batch_size=8", *_USUAL],
    "1,024 ids, 128 x 6": ["model.n_layers=6", *_WIDE],
    "1,024 ids, 96 x 8 (the main job)": [],
    "the same, D = 0": ["mtp=none"],
    "the same, D = 1": ["mtp.depth=1"],
    "the same, D = 3": ["mtp.depth=3"],
}
# Beginnings of the metrics that a row has.
_KEPT = ("step", "val/bits_per_byte", "val/agreement_depth", "decode/tokens_per_step")
_KEPT += ("decode/speedup", "evaluation", "seconds", "tokens", "parameters")


def train_for(folder: Path, overrides: list[str], steps: int, *more: str) -> float:
    """CPU seconds of a run in a process of its own."""
    given = [
        *overrides,
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}",
        "trainer.accelerator=cpu",
        "trainer.num_threads=1",
        f"run_dir={folder}",
        *more,
    ]
    return harness.usage_of([sys.executable, TRAIN, *given])["seconds"]


def train_row(name: str, seconds: float, folder: Path) -> Row:
    """Final metrics of a row after so many CPU seconds of training steps."""
    overrides = MAIN_JOBS[name]
    short = ["data.eval_bytes=1", "~callbacks.speculative_eval"]
    # The first run also builds the token store, which the others find.
    train_for(folder / "store", overrides, 1, *short)
    few, many = (train_for(folder / str(n), overrides, n, *short) for n in (20, 80))
    train_for(folder / "run", overrides, round(seconds * 60 / (many - few)))
    summary = json.loads((folder / "run" / "summary.json").read_text())
    found = {key: value for key, value in summary.items() if key.startswith(_KEPT)}
    harness.progress(f"{name}: {found['val/bits_per_byte']:.3f} bits per byte")
    return {"row": name, **found}


@cli.command(quick={"seconds": 5.0})
def main_job(seconds: float = 240.0, only: str = "") -> Row:
    """Tokenizers, shapes and depths at equal time: what should ``python train.py`` train?

    Each row trains for as many steps as so many CPU seconds of one thread hold, estimated from the
    difference of two short runs; as many rows run at once as there are cores. All are evaluated on
    one text, for any tokenizer. One seed: differences of a few hundredths mean nothing.

    Args:
        seconds: CPU seconds of training steps of each row.
        only: rows whose names contain this text.
    """
    names = [name for name in MAIN_JOBS if only in name]
    with tempfile.TemporaryDirectory(prefix="mtp-bench-") as folder:
        folders = [Path(folder) / str(i) for i in range(len(names))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = list(pool.map(train_row, names, itertools.repeat(seconds), folders))
    cli.print_table(
        f"{seconds:.0f} CPU seconds each",
        "row: row; steps: step ,; bits per byte: val/bits_per_byte .3f; "
        "agreement, depth 1: val/agreement_depth_1 .1%; depth 2: val/agreement_depth_2 .1%; "
        "tokens per pass: decode/tokens_per_step .2f; speed-up by drafts: decode/speedup .2f",
        rows,
    )
    return {"rows": rows}


main = cli.program(startup, threads, main_job)

if __name__ == "__main__":
    main()

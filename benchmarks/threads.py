"""How many threads should a CPU run have? ``python -m benchmarks.threads``

Training steps a second of ``model=nano``, with one thread and with two, with OpenMP's threads that
spin where they wait (its default) and that sleep, alone and beside other processes that keep cores
busy. And two runs of one thread at once, as a sweep has them. Every way has its turn in every
round, so that whatever else the machine does falls on all of them; the figures are medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import common

_TASK = {"model": "nano", "vocab_size": 1024, "depth": 2, "batch_size": 16, "seq_len": 256}
_WARMUP_STEPS = 2
# name -> (runs at once, threads of each, what tells OpenMP how they wait)
_WAYS: dict[str, tuple[int, int, dict[str, str]]] = {
    "1 thread": (1, 1, {}),
    "2 threads": (1, 2, {}),
    "2 threads, short spin": (1, 2, {"GOMP_SPINCOUNT": "10000"}),
    "2 threads, passive": (1, 2, {"OMP_WAIT_POLICY": "passive"}),
    "2 runs of 1 thread": (2, 1, {}),
}


def measure(task: dict[str, Any]) -> dict[str, float]:
    """Steps a second, in this process."""
    # Read when torch brings OpenMP, which nothing has imported yet.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(task["threads"])
    os.environ.update(task["waiting"])
    from benchmarks.train_step import build_step
    from mtp_lightning.runtime import keep_freed_memory

    keep_freed_memory()
    step, _, _ = build_step(task)
    for _ in range(_WARMUP_STEPS):
        step()
    done, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < task["seconds"]:
        step()
        done += 1
    return {"steps_per_second": done / seconds}


def one_round(name: str, seconds: float) -> float:
    """Steps a second of a way, those of its runs together."""
    runs, threads, waiting = _WAYS[name]
    task = {**_TASK, "threads": threads, "waiting": waiting, "seconds": seconds}
    with ThreadPoolExecutor(runs) as pool:
        found = list(pool.map(lambda _: common.run_child("benchmarks.threads", task), range(runs)))
    return sum(result["steps_per_second"] for result in found)


def compare(neighbours: int, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """All ways beside ``neighbours`` processes that never wait."""
    rates: dict[str, list[float]] = {name: [] for name in _WAYS}
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in range(neighbours)]
    try:
        for turn in range(rounds):
            common.progress(f"{neighbours} busy neighbours, round {turn + 1} of {rounds}")
            for name in _WAYS:
                rates[name].append(one_round(name, seconds))
                common.progress(f"  {name}: {rates[name][-1]:.2f} steps a second")
    finally:
        for process in busy:
            process.kill()
            process.wait()
    base = rates["1 thread"]
    return [
        {
            "neighbours": neighbours,
            "way": name,
            "steps_per_second": statistics.median(values),
            "over_one_thread": statistics.median(
                value / one for value, one in zip(values, base, strict=True)
            ),
            "rounds": values,
        }
        for name, values in rates.items()
    ]


def main() -> None:
    """The command."""
    parser = common.parser(__doc__ or "", "threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of steps, in every round")
    text = "processes beside it that never wait"
    parser.add_argument("--neighbours", type=common.whole_numbers, default=[0, 1, 2], help=text)
    args = parser.parse_args()
    if args.child:
        common.answer_parent(measure(json.loads(args.child)))
        return
    rounds = 1 if args.quick else args.rounds
    rows = [
        row
        for neighbours in args.neighbours
        for row in compare(neighbours, rounds=rounds, seconds=args.seconds)
    ]
    common.print_table(
        "Training steps a second",
        {
            "neighbours": "neighbours|d",
            "way": "way",
            "steps/s": "steps_per_second|.2f",
            "over one thread": "over_one_thread|.2f",
        },
        rows,
    )
    common.write_json({"machine": common.machine(), "task": _TASK, "rows": rows}, args.output)


if __name__ == "__main__":
    main()

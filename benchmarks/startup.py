"""How long one waits: for ``python train.py --help``, and for the first optimizer step.

Run ``python -m benchmarks.startup``. The first step is timed from the start of the process to the
line that announces it, with ``model=nano`` and its default data, in a cache folder of its own: once
with nothing in it (tokenizer and token store are built), then with everything there.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common

_TRAIN = str(common.ROOT / "train.py")
# The cap on what a benchmark may wait for one process.
_TIMEOUT = 600


def seconds_of_help() -> float:
    """Wall time of ``python train.py --help``."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, _TRAIN, "--help"], capture_output=True, text=True, timeout=_TIMEOUT
    )
    seconds = time.perf_counter() - began
    if done.returncode or "mtp.depth" not in done.stdout:
        raise RuntimeError(f"train.py --help failed:\n{done.stdout}{done.stderr}"[-4000:])
    return seconds


def seconds_to_first_step(folder: Path, name: str, overrides: list[str]) -> dict[str, float]:
    """Wall time from the start of a training process to its first optimizer step, and to its end.

    Args:
        folder: where the run and the cache go.
        name: of the run, new in ``folder``.
        overrides: of the config.

    Raises:
        RuntimeError: the run failed, or never announced a step.
    """
    command = [
        sys.executable,
        _TRAIN,
        "model=nano",
        "trainer.max_steps=1",
        "data.eval_bytes=1",
        f"run_dir={folder / name}",
        f"paths.cache_dir={folder / 'cache'}",
        "callbacks.progress.interactive=false",
        "callbacks.progress.line_every_n_steps=1",
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


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, writes the JSON and returns it."""
    parser = common.parser("Measures start-up times.", "startup")
    parser.add_argument("--repeats", type=int, help="default 5, with --quick 1")
    parser.add_argument("overrides", nargs="*", help="of the config, for the first step")
    options = parser.parse_args(arguments)
    repeats = options.repeats or (1 if options.quick else 5)

    common.progress("train.py --help")
    helps = [seconds_of_help() for _ in range(repeats)]
    with tempfile.TemporaryDirectory(prefix="mtp-bench-") as name:
        folder = Path(name)
        common.progress("first step, empty cache")
        cold = seconds_to_first_step(folder, "cold", options.overrides)
        common.progress("first step, full cache")
        warm = [
            seconds_to_first_step(folder, f"warm-{i}", options.overrides) for i in range(repeats)
        ]
    rows = [
        {"what": "train.py --help", "aim": 1.5, **_spread(helps)},
        {"what": "first step, full cache", "aim": 20.0, **_spread([w["first_step"] for w in warm])},
        {"what": "first step, empty cache", **_spread([cold["first_step"]])},
        {"what": "run of one step, full cache", **_spread([w["whole_run"] for w in warm])},
    ]
    result = {
        "benchmark": "startup",
        "repeats": repeats,
        "overrides": options.overrides,
        "rows": rows,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "machine": common.machine(),
    }
    common.print_table(
        "Seconds of waiting, model=nano",
        {
            "for": "what",
            "median": "seconds|.2f",
            "min": "fastest|.2f",
            "max": "slowest|.2f",
            "aim": "aim|.1f",
        },
        rows,
    )
    common.write_json(result, options.output)
    return result


def _spread(seconds: list[float]) -> dict[str, float]:
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
    }


if __name__ == "__main__":
    main()

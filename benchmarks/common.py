"""What every benchmark shares: timing, memory, child processes, the table and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Set, also for the children, where CPU seconds are counted.
_CPU_TIME = "MTP_LIGHTNING_BENCHMARK_CPU_TIME"

# A child hands its numbers over in a line of stdout that begins with this.
_RESULT = "benchmark-result: "


def add_cpu_time(parser: argparse.ArgumentParser) -> None:
    """The option ``--cpu-time``, for benchmarks that read :func:`clock`."""
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and its CPU seconds: for a machine that is busy with something else",
    )


def use_cpu_time() -> None:
    """Count CPU seconds of one thread, in this process and in its children.

    Waiting for a core then costs nothing; shared caches and memory still do.
    """
    import torch

    os.environ[_CPU_TIME] = os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def clock() -> float:
    """Seconds from some point on: of the wall, or of the CPU with ``--cpu-time``."""
    return time.process_time() if os.environ.get(_CPU_TIME) else time.perf_counter()


def median_times(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of every function.

    They take turns, so that a busy spell of the machine falls on all of them: the ratios of one
    call are worth more than its seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            began = clock()
            function()
            synchronize()
            if turn >= warmup:
                times[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize() -> None:
    """Wait for a GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compose_config(overrides: Sequence[str]) -> Any:
    """The config of ``train.py`` with these overrides."""
    from mtp_lightning.experiment.command_line import compose_config

    return compose_config("config", overrides)


def peak_rss() -> int:
    """The largest resident memory that this process has had, in bytes.

    Linux gives ``ru_maxrss`` of a parent to its children, even across exec; ``VmHWM`` belongs to
    the process alone.
    """
    value = _proc_status("VmHWM")
    if value is not None:
        return value
    import resource

    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


def current_rss() -> int:
    """The resident memory of this process now, in bytes; where unknown, the peak."""
    value = _proc_status("VmRSS")
    return peak_rss() if value is None else value


def _proc_status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(f"{key}:")]
    return int(found[0].split()[1]) * 1024 if found else None


class SavedTensors:
    """Counts what autograd keeps for the backward pass, every storage once.

    Attributes:
        n_bytes: of the storages saved so far, those excluded left out.
    """

    def __init__(self, excluded: Sequence[Any] = ()) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self.n_bytes = 0

    def _pack(self, tensor: Any) -> Any:
        # A saved storage lives until backward, so no other one can have its address.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.n_bytes += storage.nbytes()
        return tensor

    @contextmanager
    def counting(self) -> Iterator[SavedTensors]:
        """Count inside the block, which is a forward pass whose backward comes after it."""
        import torch

        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield self


def run_child(module: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """The result of ``python -m MODULE --child TASK``: a measurement in a process of its own.

    Raises:
        RuntimeError: the child failed; with the end of what it printed.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, "--child", json.dumps(dict(task))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not results:
        raise RuntimeError(f"{module} --child {task} failed:\n{done.stdout}{done.stderr}"[-4000:])
    result: dict[str, Any] = json.loads(results[-1].removeprefix(_RESULT))
    return result


def answer_parent(result: Mapping[str, Any]) -> None:
    """The child's side of :func:`run_child`."""
    print(_RESULT + json.dumps(dict(result)), flush=True)


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="few repeats: a look, not a result")
    parser.add_argument("--output", type=Path, default=Path(f"benchmarks/results/{name}.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def whole_numbers(text: str) -> list[int]:
    """``"0,1,2"`` -> [0, 1, 2], for argparse."""
    return [int(part) for part in text.split(",")]


def machine() -> dict[str, Any]:
    """What a number needs beside it: the machine, its load, and the versions."""
    import numpy
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "cpu" if os.environ.get(_CPU_TIME) else "wall",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def processor() -> str:
    """The name of the processor, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_table(title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of ``rows``.

    Args:
        title: over it.
        columns: ``"heading": "key|format"``; a row without the key has an empty cell.
        rows: the numbers; a column is to the left if its first value is text.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    cells = [key.partition("|") for key in columns.values()]
    for heading, (key, _, _) in zip(columns, cells, strict=True):
        text = any(isinstance(row.get(key), str) for row in rows)
        table.add_column(heading, justify="left" if text else "right")
    for row in rows:
        values = [(row.get(key), form) for key, _, form in cells]
        table.add_row(*("" if value is None else format(value, form) for value, form in values))
    # In a file or a pipe, too, a table is as wide as it has to be.
    console = Console()
    Console(width=console.width if console.is_terminal else 160).print(table)


def write_json(result: Mapping[str, Any], path: Path) -> None:
    """Write the result, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(result), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def progress(text: str) -> None:
    """Say on stderr what is being measured: a benchmark can take minutes."""
    print(text, file=sys.stderr, flush=True)

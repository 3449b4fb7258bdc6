"""The common code of all benchmarks: clocks, turns, processes and memory.

A measurement is a generator. It sets up, yields facts about itself, and then yields one answer a
turn. It runs in a :class:`Worker`, a process of its own, which may use another Python or the code
of another commit. The sides of a comparison take turns, so that other work on the machine slows all
of them down alike: compare the ratios of one run rather than its seconds.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
Side = TypeVar("Side")
Method = tuple[type, str]  # a class, and the name of its method

# This variable tells workers, too, that CPU seconds are counted.
_CPU_TIME = "MTP_LIGHTNING_BENCHMARK_CPU_TIME"
# Bytes of a unit of ``ru_maxrss``.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
# A worker's answers are the lines of stdout that begin with this.
_ANSWER = "benchmark-result: "


def use_cpu_time() -> None:
    """Count CPU seconds of one thread, in this process and its workers, instead of wall time.

    Waiting for a core then costs nothing. Other work still slows down caches and memory.
    """
    os.environ[_CPU_TIME] = os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def counts_cpu_time() -> bool:
    """Whether :func:`clock` counts CPU seconds."""
    return bool(os.environ.get(_CPU_TIME))


def clock() -> float:
    """Seconds since an arbitrary moment: wall time, or CPU time with ``--cpu-time``."""
    return time.process_time() if counts_cpu_time() else time.perf_counter()


def synchronize() -> None:
    """Wait for a GPU, if there is one and this process has imported torch."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(
    sides: Mapping[Side, Callable[[], Any]], turns: int, *, say: str = ""
) -> dict[Side, list[Any]]:
    """Run every side once a turn, in reverse order every second turn; returns the answers of each.
    Before each turn, ``say`` is printed as progress, unless it is empty."""
    answers: dict[Side, list[Any]] = {name: [] for name in sides}
    order = list(sides)
    for turn in range(turns):
        if say:
            progress(f"{say}: turn {turn + 1} of {turns}")
        for name in order:
            answers[name].append(sides[name]())
        order.reverse()
    return answers


def seconds_of(function: Callable[[], Any]) -> float:
    """Seconds of one call, by :func:`clock`."""
    began = clock()
    function()
    synchronize()
    return clock() - began


def timed(function: Callable[[], Any]) -> Row:
    """The ``result`` of one call, and the seconds that it takes: ``wall`` and ``cpu``."""
    began, cpu_began = time.perf_counter(), time.process_time()
    result = function()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return {"result": result, "wall": wall, "cpu": cpu}


def median_times(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of functions that take turns, without the first ``warmup`` turns."""
    calls = {name: partial(seconds_of, function) for name, function in functions.items()}
    times = take_turns(calls, warmup + repeats)
    return {name: statistics.median(values[warmup:]) for name, values in times.items()}


@contextlib.contextmanager
def timed_calls(parts: Mapping[str, Sequence[Method]]) -> Iterator[dict[str, list[float]]]:
    """Time every call of the methods of each part, without the calls of the others inside it.

    Yields:
        Name of a part -> seconds of each call that has ended, by :func:`clock`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    inside: list[float] = []  # seconds inside each open call

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            inside.append(0.0)
            began = clock()
            result = method(*args, **options)
            synchronize()
            took = clock() - began
            seconds[name].append(took - inside.pop())
            if inside:
                inside[-1] += took
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name, methods in parts.items():
            for kind, method in methods:
                call = timed(name, getattr(kind, method))
                stack.enter_context(mock.patch.object(kind, method, call))
        yield seconds


def medians(answers: Sequence[Row]) -> Row:
    """The median of each number over answers that have the same keys."""
    return {key: statistics.median(answer[key] for answer in answers) for key in answers[0]}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median over turns of ``slow / fast``."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


Measurement = Callable[[Row], Iterator[Row]]


class Worker:
    """A measurement in a process of its own.

    Args:
        measurement: a function of a module that can be imported, or ``MODULE:FUNCTION``.
        task: the function's argument.
        tree: the checkout whose code runs.
        python: the interpreter.
        environment: variables added to this process's.

    Raises:
        RuntimeError: the process failed; the message ends with its stderr.
    """

    def __init__(
        self,
        measurement: Measurement | str,
        task: Row,
        *,
        tree: Path = ROOT,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        name = (
            measurement
            if isinstance(measurement, str)
            else f"{module_of(measurement)}:{measurement.__name__}"
        )
        self._command = [python, "-m", "benchmarks.harness", name, json.dumps(task)]
        # The file is read after the process has failed.
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            self._command,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        try:
            self.first = self._answer()  # the measurement's facts, yielded before its first turn
        except BaseException:
            self.end()
            raise

    def turn(self) -> Row:
        """The measurement's next answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _answer reports that the process ended
            print(file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                answer: Row = json.loads(line.removeprefix(_ANSWER))
                return answer
        self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read()[-4000:]
        raise RuntimeError(f"{' '.join(self._command)} failed:\n{said}")

    def end(self) -> None:
        """Let the process end, and wait for it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def module_of(function: Callable[..., Any]) -> str:
    """The name of a function's module; that of the file in a program started by ``python -m``."""
    if function.__module__ != "__main__":
        return function.__module__
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "benchmarks are started with python -m"
    return spec.name


def race(
    sides: Mapping[Side, Callable[[], Worker]], turns: int, *, say: str = ""
) -> dict[Side, list[Row]]:
    """Measurements that take turns as in :func:`take_turns`, all their processes open at once.

    Returns:
        Name -> the answers of all turns, each with the facts of its process.
    """
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(start()) for name, start in sides.items()}
        turn = {name: worker.turn for name, worker in workers.items()}
        found = take_turns(turn, turns, say=say)
        return {name: [workers[name].first | one for one in own] for name, own in found.items()}


def measure_once(measurement: Measurement | str, task: Row, **options: Any) -> Row:
    """The facts and the first answer of a measurement in a process of its own; arguments as in
    :class:`Worker`. The ``name`` of the task, if it has one, is printed as progress."""
    if "name" in task:
        progress(task["name"])
    with Worker(measurement, task, **options) as worker:
        return worker.first | worker.turn()


def usage_of(command: Sequence[str], *, tree: Path = ROOT) -> Row:
    """CPU ``seconds`` and peak memory (``rss``, bytes) of a program, from its start to its end.

    Raises:
        RuntimeError: the program failed; the message ends with its output.
    """
    own = {**os.environ, "PYTHONPATH": str(tree)}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, cwd=tree, env=own, stdout=said, stderr=said)
        # wait4 counts this process and the children that it waited for.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read()[-4000:]}")
    return {"seconds": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss * _RSS_UNIT}


def _serve(name: str, task: str) -> None:
    """Run in a worker: answer once, then once for each line of stdin."""
    module, _, function = name.partition(":")
    answers = getattr(importlib.import_module(module), function)(json.loads(task))
    while True:
        print(_ANSWER + json.dumps(next(answers)), flush=True)
        if not sys.stdin.readline():
            return


def compose_config(overrides: Sequence[str]) -> Any:
    """The config of ``train.py`` with these overrides."""
    from mtp_lightning.experiment.compose import compose_config

    return compose_config("config", overrides)


def peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes.

    On Linux a child inherits its parent's ``ru_maxrss``, even across exec, so ``VmHWM`` is read.
    """
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    return _proc_status("VmHWM") or own


def current_rss() -> int:
    """The resident memory of this process, in bytes; its peak where the system lacks the figure."""
    return _proc_status("VmRSS") or peak_rss()


def private_rss() -> int:
    """The resident memory that no file backs, in bytes; 0 where the system lacks the figure."""
    return _proc_status("RssAnon")


def _proc_status(key: str) -> int:
    """A memory of this process in bytes; 0 where Linux does not tell it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def saved_tensors(excluded: Iterable[Any] = ()) -> Iterator[Row]:
    """Count the bytes that autograd holds for backward, every storage once.

    Counted is what forward passes in the block save, until their backward passes free it, except
    for the ``excluded`` tensors, such as parameters.

    Yields:
        ``now``: the bytes held; ``peak``: the most that was held at once.
    """
    import torch

    apart = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    holders: Counter[int] = Counter()
    count = {"now": 0, "peak": 0}

    class Saved:
        def __init__(self, tensor: Any) -> None:
            # No other storage can have this address while the tensor is held.
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.address, self.n_bytes = storage.data_ptr(), storage.nbytes()
            count["now"] += 0 if holders[self.address] else self.n_bytes
            count["peak"] = max(count["peak"], count["now"])
            holders[self.address] += 1

        def __del__(self) -> None:
            holders[self.address] -= 1
            count["now"] -= 0 if holders[self.address] else self.n_bytes

    def pack(tensor: Any) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in apart else Saved(tensor)

    def unpack(saved: Any) -> Any:
        return saved.tensor if isinstance(saved, Saved) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield count


def progress(text: str) -> None:
    """Print a line to stderr: a benchmark can take minutes."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])

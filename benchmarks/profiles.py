"""Where an optimizer step's time goes: by part of the platform and by kind of layer, both ways.

Every part and every layer of the model opens a span of PyTorch's profiler. A moment belongs to the
innermost open span; one of a backward pass belongs to the layer whose forward pass made the node of
the graph, since autograd gives both the same number. So the shares of a step add up to 1.

The shapes of what an operator reads say its work. Three bounds stand next to each time: what the
products would take at the rate of the fastest product of 1024^3, what the numbers read would take
at the rate of a copy in the cache, and what the operators would take if each cost as much as one on
a single number. Work inside the layers' C++ code is not visible to the profiler, so its time counts
and its FLOPs do not. Profiled operators are slower than others: shares mean more than times.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import cli, harness
from benchmarks.harness import Row
from benchmarks.workloads import Training, fastest_product

STEP, LOSS, PRODUCTS, LIGHTNING = "the module's step", "losses", "head's products", "Lightning"
_MARK = "part: "
_NODE = "autograd::engine::evaluate_function"
_OPERATORS = ("aten::", "mkldnn::")
_MATMULS = {"aten::bmm", "aten::mm", "mkldnn::_linear_pointwise"}
_ADDED_MATMULS = {"aten::addmm_", "aten::addmm"}
# These look at memory in another way, and read none of it.
_VIEWS = re.compile(
    r"view|slice|transpose|permute|as_strided|select|split|chunk|narrow|expand|squeeze|reshape"
    r"|alias|detach|empty|resolve|aten::t$|resize|result_type|promote|unbind|contiguous|zero_"
)


class Watch:
    """Profiles what happens between :meth:`start` and :meth:`stop`.

    Args:
        rest: the part that has what no inner span has.
    """

    def __init__(self, rest: str) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self._whole = record_function(_MARK + rest)

    def start(self) -> None:
        self._profile.start()
        self._whole.__enter__()

    def stop(self) -> None:
        self._whole.__exit__(None, None, None)
        self._profile.stop()

    def rows(self, n_steps: int, seconds_per_step: float | None = None) -> list[Row]:
        """A row for every part, the largest first.

        Args:
            n_steps: that were watched.
            seconds_per_step: without the profiler; default: with it.

        Returns:
            ``part``, ``share``, ``ms``, ``operators`` and ``gflop`` a step, and the bounds
            ``products_ms``, ``memory_ms`` and ``calls_ms``.
        """
        found = _work(list(self._profile.events()))
        rates, total = Rates(), sum(work["us"] for work in found.values())
        step_ms = total / n_steps / 1e3 if seconds_per_step is None else seconds_per_step * 1e3
        rows = [
            {
                "part": part,
                "share": work["us"] / total,
                "ms": work["us"] / total * step_ms,
                "operators": work["operators"] / n_steps,
                "gflop": work["flops"] / n_steps / 1e9,
                "products_ms": work["flops"] / n_steps / rates.flops * 1e3,
                "memory_ms": work["numbers"] / n_steps / rates.numbers * 1e3,
                "calls_ms": work["operators"] / n_steps * rates.call_seconds * 1e3,
            }
            for part, work in found.items()
        ]
        return sorted(rows, key=lambda row: -row["ms"])


def of_step(built: Training, *, n_steps: int, seconds_per_step: float) -> list[Row]:
    """:meth:`Watch.rows` of some steps, warmed up."""
    watch = Watch(STEP)
    with step_spans(built.model, built.optimizer):
        watch.start()
        for _ in range(n_steps):
            built.step()
        watch.stop()
    return watch.rows(n_steps, seconds_per_step)


class Rates:
    """What this machine does at best, in this process.

    Attributes:
        flops: FLOPs a second of the fastest product, 1024^3.
        numbers: fp32 numbers per second that a copy in the cache reads.
        call_seconds: of an operator on one number.
    """

    def __init__(self) -> None:
        a, b, small = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.zeros(1)
        block, into = torch.randn(2**16), torch.empty(2**16)

        def copies() -> None:
            for _ in range(100):
                into.copy_(block)

        def calls() -> None:
            for _ in range(1000):
                small.add_(small)

        seconds = harness.median_times(
            {"product": lambda: fastest_product(a, b), "copies": copies, "calls": calls}, repeats=5
        )
        self.flops = 2 * 1024**3 / seconds["product"]
        self.numbers = 100 * block.numel() / seconds["copies"]
        self.call_seconds = seconds["calls"] / 1000


def _work(events: list[Any]) -> dict[str, dict[str, float]]:
    """Microseconds, operators, FLOPs and numbers read of every part."""
    makers: dict[int, Any] = {}  # number of a node -> the newest forward operator that has it
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not event.name.startswith(_NODE) and not _in_node(event):
            makers[event.sequence_nr] = event

    @functools.cache
    def part_of(event: Any) -> str | None:
        if event.name.startswith(_MARK):
            return str(event.name.removeprefix(_MARK))
        if event.name.startswith(_NODE):
            maker = makers.get(event.sequence_nr)
            found = None if maker is None else part_of(maker)
            return "gradients of weights, added up" if found is None else f"{found}, backward"
        found = None if event.cpu_parent is None else part_of(event.cpu_parent)
        return PRODUCTS if found == LOSS and event.name in _MATMULS | _ADDED_MATMULS else found

    parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        part = part_of(event)
        if part is None:  # outside of the watched steps
            continue
        work = parts[part]
        work["us"] += event.self_cpu_time_total
        if not event.name.startswith(_OPERATORS):
            continue
        parent = "" if event.cpu_parent is None else event.cpu_parent.name
        work["operators"] += not parent.startswith(_OPERATORS)
        shapes = [shape for shape in event.input_shapes if shape]
        work["flops"] += flops_of(event.name, shapes)
        if not parent.startswith("aten::") and not _VIEWS.search(event.name):
            work["numbers"] += sum(math.prod(shape) for shape in shapes)
    return parts


def _in_node(event: Any) -> bool:
    """Whether an operator belongs to a backward pass, whose operators repeat the node's number."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        if event.name.startswith(_NODE):
            return True
        if event.name.startswith(_MARK):
            return False
    return False


def flops_of(name: str, shapes: list[list[int]]) -> int:
    """FLOPs of a matrix product, from the shapes of its operands; 0 for anything else."""
    if name in _ADDED_MATMULS:
        shapes = shapes[1:]
    elif name not in _MATMULS:
        return 0
    left, right = shapes[0], shapes[1]
    columns = right[0] if name == "mkldnn::_linear_pointwise" else right[-1]
    return 2 * math.prod(left) * columns


@contextmanager
def spans(methods: list[tuple[Any, str, str]]) -> Iterator[None]:
    """Inside, calls of ``(owner, name of a method, part)`` open spans of these parts."""

    def labelled(method: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(_MARK + part):
                return method(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, name, part in methods:
            call = labelled(getattr(owner, name), part)
            stack.enter_context(mock.patch.object(owner, name, call))
        yield


@contextmanager
def step_spans(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the layers of a model and the parts of its optimizer step open spans."""
    from mtp_lightning.objective.step import OptimizerStep

    parts = [
        (OptimizerStep, "loss", LOSS),
        (torch.Tensor, "backward", STEP),
        (nn.utils, "clip_grad_norm_", "clipping"),
        (optimizer, "step", "optimizer"),
        (optimizer, "zero_grad", "optimizer"),
    ]
    labels = {}
    for parent in model.modules():
        for child in parent.children():
            kind = type(child).__name__
            of = f" of {type(parent).__name__}" if kind == "Linear" else ""
            labels[child] = _MARK + kind + of
    opened: list[Any] = []

    def enter(layer: nn.Module, inputs: Any) -> None:
        if layer in labels:
            opened.append(record_function(labels[layer]))
            opened[-1].__enter__()

    def leave(layer: nn.Module, inputs: Any, output: Any) -> None:
        if layer in labels:
            opened.pop().__exit__(None, None, None)

    hooks = nn.modules.module
    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave),
    ]
    try:
        with spans(parts):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def run_spans(trainer: Any, module: Any) -> Iterator[None]:
    """Inside, the parts of a run's step open spans: data, logging and callbacks, too."""
    from mtp_lightning.module import MTPModule

    connector, optimizer = type(trainer._logger_connector), trainer.optimizers[0]
    methods: list[tuple[Any, str, str]] = [(MTPModule, "training_step", STEP)]
    methods += [(MTPModule, "manual_backward", LIGHTNING)]
    methods += [(MTPModule, name, "logging") for name in ("log_here", "log_dict", "log")]
    of_logger = ("on_batch_start", "on_batch_end", "update_train_step_metrics")
    methods += [(connector, name, "logging") for name in of_logger]
    of_callback = ("on_train_batch_start", "on_train_batch_end")
    for callback in trainer.callbacks:
        if not type(callback).__module__.startswith("benchmarks."):
            methods += [(callback, name, "callbacks") for name in of_callback]
    batches = trainer.fit_loop._data_fetcher.combined_loader._iterator.iterators
    batches[:] = [_Labelled(inner) for inner in batches]
    try:
        with spans(methods), step_spans(module.model, optimizer):
            yield
    finally:
        batches[:] = [labelled.inner for labelled in batches]


class _Labelled:
    """An iterator of batches whose work belongs to the data."""

    def __init__(self, inner: Iterator[Any]) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with record_function(_MARK + "data"):
            return next(self.inner)


def show(title: str, rows: list[Row]) -> None:
    """The table of one model."""
    cli.print_table(
        f"{title} (the profiler slows operators down: read shares)",
        "part: part; ms: ms .2f; share: share .1%; GFLOP: gflop .2f; "
        "products alone, ms: products_ms .2f; memory alone, ms: memory_ms .2f; "
        "operators: operators .0f; calls alone, ms: calls_ms .2f",
        rows,
    )

"""Divides the time of an optimizer step among its parts and the kinds of layers.

Every part and every layer of the model opens a span of PyTorch's profiler. A moment belongs to the
innermost open span; a moment of the backward pass belongs to the layer whose forward pass made the
node of the graph, since autograd gives both the same number. So the shares of a step add up to 1.

The shapes of an operator's inputs give its FLOPs. Work inside the layers' C++ is not visible to the
profiler: its time counts and its FLOPs do not. The profiler slows operators down, so shares mean
more than times.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.workloads import Training
from mtp_lightning.nn.ops import matmul_transposed
from mtp_lightning.objective import step as optimizer_step

STEP, LOSS, PRODUCTS = "the module's step", "losses", "head's products"
_MARK = "part: "
_NODE = "autograd::engine::evaluate_function"
_OPERATORS = ("aten::", "mkldnn::")
_MATMULS = {"aten::bmm", "aten::mm", "mkldnn::_linear_pointwise"}
_ADDED_MATMULS = {"aten::addmm_", "aten::addmm"}


def profile_step(built: Training, *, n_steps: int, seconds_per_step: float) -> list[Row]:
    """Profile some steps of a model that is warmed up, whose step takes ``seconds_per_step``
    without the profiler.

    Returns:
        A row for each part, the largest first: ``part``, ``share`` of the step, ``ms``,
        ``operators`` and ``gflop`` per step, and ``products_ms``: what its products would take at
        the rate of the fastest product of 1024^3.
    """
    watch = profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True)
    with _step_spans(built.model, built.optimizer), watch, record_function(_MARK + STEP):
        for _ in range(n_steps):
            built.step()
    found = _work(list(watch.events()))
    total, flops = sum(work["us"] for work in found.values()), _product_rate()
    rows = [
        {
            "part": part,
            "share": work["us"] / total,
            "ms": work["us"] / total * seconds_per_step * 1e3,
            "operators": work["operators"] / n_steps,
            "gflop": work["flops"] / n_steps / 1e9,
            "products_ms": work["flops"] / n_steps / flops * 1e3,
        }
        for part, work in found.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def _product_rate() -> float:
    """FLOPs a second of the fastest product of 1024^3."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = harness.median_times({"product": lambda: matmul_transposed(a, b)}, repeats=5)
    return 2 * 1024**3 / seconds["product"]


def _work(events: list[Any]) -> dict[str, dict[str, float]]:
    """Microseconds, operators and FLOPs of every part."""
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
        if part is None:  # outside of the profiled steps
            continue
        work = parts[part]
        work["us"] += event.self_cpu_time_total
        if event.name.startswith(_OPERATORS):
            inner = event.cpu_parent is not None and event.cpu_parent.name.startswith(_OPERATORS)
            work["operators"] += not inner
            work["flops"] += _flops(event.name, [shape for shape in event.input_shapes if shape])
    return parts


def _in_node(event: Any) -> bool:
    """Whether an operator is of a backward pass, whose operators repeat the node's number."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        if event.name.startswith(_NODE):
            return True
        if event.name.startswith(_MARK):
            return False
    return False


def _flops(name: str, shapes: list[list[int]]) -> int:
    """FLOPs of a matrix product, from the shapes of its operands; 0 for other operators."""
    if name in _ADDED_MATMULS:
        shapes = shapes[1:]
    elif name not in _MATMULS:
        return 0
    left, right = shapes[0], shapes[1]
    columns = right[0] if name == "mkldnn::_linear_pointwise" else right[-1]
    return 2 * math.prod(left) * columns


@contextmanager
def _step_spans(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let the layers of a model and the parts of its optimizer step open spans."""
    parts = [
        (optimizer_step, "micro_batch_loss", LOSS),
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

    def labelled(method: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(_MARK + part):
                return method(*args, **kwargs)

        return call

    hooks = nn.modules.module
    with ExitStack() as stack:
        for owner, name, part in parts:
            call = labelled(getattr(owner, name), part)
            stack.enter_context(mock.patch.object(owner, name, call))
        stack.enter_context(hooks.register_module_forward_pre_hook(enter))
        stack.enter_context(hooks.register_module_forward_hook(leave))
        yield

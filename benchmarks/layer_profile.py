"""Where an optimizer step's time goes by kind of layer, forward and backward, and what bounds it.

PyTorch's profiler sees every operator. The autograd function around it, or the node of the
backward pass, says the kind of layer; the shapes of what it reads say its work. Three bounds stand
beside each time: what the products would take at the rate of the fastest product of 1024^3, what
the numbers read would take at the rate of a copy in the cache, and what the operators would take
if each cost what one on a single number does. What the layers' C++ code does inside is not among
these. Profiled operators are slower: shares of the profile are shares of a step's time without it.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from mtp_lightning.nn.ops import matmul_transposed

# What the name of an operator, function or node has in it -> kind; the first that fits.
_KINDS = {
    "Linear": "linear",
    "Attention": "attention",
    "attention": "attention",
    "RMSNorm": "norm",
    "SwiGLU": "activation",
    "Rope": "rope",
    "mbedding": "embedding",
    "NativeExperts": "feed-forward",
    "Experts": "experts",
    "Optimizer": "optimizer",
    "_foreach": "optimizer",
    "AccumulateGrad": "optimizer",
}
_LOSS = "StackLoss"
_NODE = "autograd::engine::evaluate_function: "
_PRODUCTS = {"aten::bmm", "aten::mm", "mkldnn::_linear_pointwise"}
_ADDED_PRODUCTS = {"aten::addmm_", "aten::addmm"}
# What only looks at memory in another way reads none.
_VIEWS = re.compile(
    r"view|slice|transpose|permute|as_strided|select|split|chunk|narrow|expand|squeeze|reshape"
    r"|alias|detach|empty|resolve|aten::t$|resize|result_type|promote|unbind|contiguous|zero_"
)


def measure(
    step: Callable[[], Any], *, seconds_per_step: float, n_steps: int
) -> list[dict[str, Any]]:
    """A row for every kind of layer and direction, the largest first.

    Args:
        step: an optimizer step, warmed up.
        seconds_per_step: what it takes without the profiler.
        n_steps: that are watched.

    Returns:
        ``part``, ``direction``, ``share``, ``ms`` a step, ``operators`` a step, ``gflop`` a step
        of the operators that the profiler sees, and the bounds in ms: ``products_ms``,
        ``memory_ms``, ``calls_ms``.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watched:
        for _ in range(n_steps):
            step()
    rates = Rates()
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in watched.events():
        work = found[place_of(event)]
        work["us"] += event.self_cpu_time_total
        if not event.name.startswith(("aten::", "mkldnn::")):
            continue
        parent = "" if event.cpu_parent is None else event.cpu_parent.name
        if not parent.startswith(("aten::", "mkldnn::")):
            work["operators"] += 1
        shapes = [shape for shape in event.input_shapes if shape]
        work["flops"] += flops_of(event.name, shapes)
        if not parent.startswith("aten::") and not _VIEWS.search(event.name):
            work["numbers"] += sum(math.prod(shape) for shape in shapes)
    total = sum(work["us"] for work in found.values())
    rows = [
        {
            "part": part,
            "direction": direction,
            "share": work["us"] / total,
            "ms": work["us"] / total * seconds_per_step * 1e3,
            "operators": work["operators"] / n_steps,
            "gflop": work["flops"] / n_steps / 1e9,
            "products_ms": work["flops"] / n_steps / rates.flops * 1e3,
            "memory_ms": work["numbers"] / n_steps / rates.numbers * 1e3,
            "calls_ms": work["operators"] / n_steps * rates.call_seconds * 1e3,
        }
        for (part, direction), work in found.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


class Rates:
    """What this machine does at best, in this process.

    Attributes:
        flops: FLOPs a second of the fastest product, 1024^3.
        numbers: fp32 numbers a second that a copy in the cache reads.
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

        seconds = common.median_times(
            {"product": lambda: matmul_transposed(a, b), "copies": copies, "calls": calls},
            repeats=5,
        )
        self.flops = 2 * 1024**3 / seconds["product"]
        self.numbers = 100 * block.numel() / seconds["copies"]
        self.call_seconds = seconds["calls"] / 1000


def place_of(event: Any) -> tuple[str, str]:
    """The kind of layer that an operator belongs to, and the direction."""
    inside = [event]
    while inside[-1].cpu_parent is not None:
        inside.append(inside[-1].cpu_parent)
    names = [one.name for one in inside]
    backward = any(name.startswith(_NODE) for name in names)
    # The innermost name that says a kind: the loss has heads side by side in it.
    for name in names:
        kind = next((kind for part, kind in _KINDS.items() if part in name), None)
        if kind is not None:
            return kind, "after" if kind == "optimizer" else "backward" if backward else "forward"
    if any(_LOSS in name for name in names):
        # Both ways in one: the head's products, and what is between them.
        return ("head" if _PRODUCTS.intersection(names) else "loss"), "both"
    if names[-1].startswith("aten::add"):
        return "residual", "forward"
    return "rest", "backward" if backward else "forward"


def flops_of(name: str, shapes: list[list[int]]) -> int:
    """FLOPs of a matrix product, from the shapes of its operands; of anything else 0."""
    if name in _ADDED_PRODUCTS:
        shapes = shapes[1:]
    elif name not in _PRODUCTS:
        return 0
    left, right = shapes[0], shapes[1]
    columns = right[0] if name == "mkldnn::_linear_pointwise" else right[-1]
    return 2 * math.prod(left) * columns


def median_step(step: Callable[[], Any], n_steps: int) -> float:
    """Median seconds of a step."""
    seconds = []
    for _ in range(n_steps):
        began = common.clock()
        step()
        seconds.append(common.clock() - began)
    return statistics.median(seconds)


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """The table of one model."""
    common.print_table(
        title,
        {
            "layer": "part",
            "direction": "direction",
            "ms": "ms|.2f",
            "share": "share|.1%",
            "GFLOP": "gflop|.2f",
            "products alone, ms": "products_ms|.2f",
            "memory alone, ms": "memory_ms|.2f",
            "operators": "operators|.0f",
            "calls alone, ms": "calls_ms|.2f",
        },
        rows,
    )

"""The shared head's loss: chunked here, on whole logits, or by PyTorch's own chunked function.

Run ``python -m benchmarks.head``. Forward and backward of the cross-entropy of one depth, micro's
width, batch 8 x 256. The implementations take turns in one process for time; for memory each runs
in a process of its own, and what counts is how far it raises the peak above inputs and weight. A
sweep over the size of a chunk of logits then shows what ``_CHUNK_NUMEL`` in
``mtp_lightning/objective/through_head.py`` should be on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from mtp_lightning.mtp.feed import Together
from mtp_lightning.objective import through_head
from mtp_lightning.objective.stream import stream_loss
from mtp_lightning.objective.targets import DepthTarget
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.runtime import keep_freed_memory

MODULE = "benchmarks.head"
CHUNK_NUMELS = {"cpu": range(20, 26), "cuda": range(22, 30)}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, *, compiled: bool = False) -> Tensor:
    """This project's; ``compiled`` as with compiled blocks on a GPU."""
    target = DepthTarget(0, targets, 1.0 / len(targets), CrossEntropy())
    return stream_loss(weight, Together(hidden, [], {}), [target], compiled=compiled)[0]


def whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What most code does."""
    return F.cross_entropy(F.linear(hidden, weight), targets)


def pytorch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """``F.linear_cross_entropy`` of torch 2.13, asked for chunks."""
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return F.linear_cross_entropy(hidden, weight, targets, options=options)  # type: ignore


def implementations() -> dict[str, Loss]:
    """Those that this PyTorch has."""
    found: dict[str, Loss] = {
        "chunked": chunked,
        "chunked, compiled": partial(chunked, compiled=True),
        "whole logits": whole_logits,
    }
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = pytorch_chunked
    return found


def inputs(task: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [M, C], the head's weight [V, C] and targets [M]."""
    generator = torch.Generator().manual_seed(0)
    rows, d_model, vocab_size = task["rows"], task["d_model"], task["vocab_size"]
    hidden = torch.randn(rows, d_model, generator=generator).to(task["device"])
    weight = (0.02 * torch.randn(vocab_size, d_model, generator=generator)).to(task["device"])
    targets = torch.randint(vocab_size, (rows,), generator=generator).to(task["device"])
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def one_pass(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """Forward and backward; the loss."""
    hidden.grad = weight.grad = None
    value = loss(hidden, weight, targets)
    value.backward()
    return float(value.detach())


def measure_memory(task: dict[str, Any]) -> dict[str, Any]:
    """Bytes that one pass needs at its peak, beyond what was there before it.

    The gradients of hidden states and weight are part of it. The memory of a first matrix product
    (threads, kernels) is not: a small pass goes first.
    """
    loss = implementations()[task["implementation"]]
    small = inputs({**task, "rows": 64, "vocab_size": 64})
    one_pass(loss, *small)
    tensors = inputs(task)
    if task["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_pass(loss, *tensors)
        return {"peak_bytes": torch.cuda.max_memory_allocated() - before}
    before = common.current_rss()
    one_pass(loss, *tensors)
    return {"peak_bytes": common.peak_rss() - before}


@contextmanager
def chunk_numel(numel: int, device: str) -> Iterator[None]:
    """The chunk of logits holds ``numel`` numbers, however few rows that is."""
    sizes, rows = dict(through_head._CHUNK_NUMEL), through_head._MIN_CHUNK_ROWS
    through_head._CHUNK_NUMEL[device], through_head._MIN_CHUNK_ROWS = numel, 1
    try:
        yield
    finally:
        through_head._CHUNK_NUMEL.update(sizes)
        through_head._MIN_CHUNK_ROWS = rows


def compare(task: dict[str, Any], names: list[str], repeats: int) -> list[dict[str, Any]]:
    """One row an implementation: milliseconds and peak memory."""
    tensors = inputs(task)
    losses = implementations()
    functions = {name: partial(one_pass, losses[name], *tensors) for name in names}
    values = {name: function() for name, function in functions.items()}
    seconds = common.median_times(functions, repeats=repeats)
    flops = 6 * task["rows"] * task["d_model"] * task["vocab_size"]
    rows = []
    for name in names:
        memory = common.run_child(MODULE, {**task, "implementation": name})
        rows.append(
            {
                "vocab_size": task["vocab_size"],
                "device": task["device"],
                "implementation": name,
                "loss": values[name],
                "ms": seconds[name] * 1e3,
                "time_over_first": seconds[name] / seconds[names[0]],
                "gflops": flops / seconds[name] / 1e9,
                "peak_mb": memory["peak_bytes"] / 1e6,
                "logits_mb": 4 * task["rows"] * task["vocab_size"] / 1e6,
            }
        )
    return rows


def sweep(task: dict[str, Any], numels: list[int], repeats: int) -> list[dict[str, Any]]:
    """One row a chunk size, and which one this project takes."""
    tensors, device = inputs(task), task["device"]
    taken = through_head.chunk_rows(task["vocab_size"], torch.device(device))

    def with_chunk(numel: int) -> None:
        with chunk_numel(numel, device):
            one_pass(chunked, *tensors)

    candidates: dict[int, int] = {}
    for numel in numels:
        # Larger chunks than the input are all the same one.
        rows = min(max(numel // task["vocab_size"], 1), task["rows"])
        candidates.setdefault(rows, numel)
    seconds = common.median_times(
        {str(rows): partial(with_chunk, numel) for rows, numel in candidates.items()},
        repeats=repeats,
    )
    best = min(seconds.values())
    return [
        {
            "vocab_size": task["vocab_size"],
            "device": device,
            "chunk_numel": numel,
            "rows": rows,
            "chunk_mb": 4 * rows * task["vocab_size"] / 1e6,
            "ms": seconds[str(rows)] * 1e3,
            "over_best": seconds[str(rows)] / best,
            "best": "best" if seconds[str(rows)] == best else "",
            "taken": "taken" if rows == min(taken, task["rows"]) else "",
        }
        for rows, numel in candidates.items()
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the tables, writes the JSON and returns it."""
    parser = common.parser("Measures the shared head's loss.", "head")
    parser.add_argument("--vocab-sizes", type=common.whole_numbers, default=[4096, 32768])
    parser.add_argument("--d-model", type=int, help="default: micro's")
    parser.add_argument("--rows", type=int, default=8 * 256, help="positions of one depth")
    parser.add_argument("--repeats", type=int, help="default 15, with --quick 3")
    parser.add_argument("--chunks", type=common.whole_numbers, help="sizes to try, as powers of 2")
    parser.add_argument(
        "--implementations", nargs="+", choices=implementations(), default=list(implementations())
    )
    common.add_cpu_time(parser)
    options = parser.parse_args(arguments)
    if options.cpu_time:
        common.use_cpu_time()
    if options.child:
        result = measure_memory(json.loads(options.child))
        common.answer_parent(result)
        return result
    repeats = options.repeats or (3 if options.quick else 15)
    d_model = options.d_model or common.compose_config(["model=micro"]).model.d_model

    compared, swept = [], []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        numels = [2**power for power in options.chunks or CHUNK_NUMELS[device]]
        for vocab_size in options.vocab_sizes:
            common.progress(f"{device}  V={vocab_size}")
            task = {
                "vocab_size": vocab_size,
                "d_model": d_model,
                "rows": options.rows,
                "device": device,
            }
            compared += compare(task, options.implementations, repeats)
            swept += sweep(task, numels, repeats)
    result = {
        "benchmark": "head",
        "d_model": d_model,
        "rows": options.rows,
        "repeats": repeats,
        "implementations": compared,
        "chunks": swept,
        "machine": common.machine(),
    }
    print_tables(result)
    common.write_json(result, options.output)
    return result


def print_tables(result: dict[str, Any]) -> None:
    """The implementations, then the sweep."""
    common.print_table(
        f"Forward and backward of one depth's loss, {result['rows']} x {result['d_model']}, fp32",
        {
            "device": "device",
            "V": "vocab_size|,",
            "implementation": "implementation",
            "loss": "loss|.5f",
            "ms": "ms|.1f",
            "over first": "time_over_first|.2f",
            "GFLOP/s": "gflops|.0f",
            "peak MB": "peak_mb|.0f",
            "whole logits MB": "logits_mb|.0f",
        },
        result["implementations"],
    )
    common.print_table(
        "Size of a chunk of logits",
        {
            "device": "device",
            "V": "vocab_size|,",
            "numbers": "chunk_numel|,",
            "rows": "rows|,",
            "MB": "chunk_mb|.1f",
            "ms": "ms|.1f",
            "over best": "over_best|.2f",
            "": "best",
            " ": "taken",
        },
        result["chunks"],
    )


if __name__ == "__main__":
    keep_freed_memory()  # as the apps do
    main()

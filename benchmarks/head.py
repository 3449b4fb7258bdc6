"""The shared head: its loss, and what every objective costs in it.

    python -m benchmarks.head               implementations of the loss, and sizes of its chunks
    python -m benchmarks.head objectives    every objective next to cross-entropy

The implementations of one depth's cross-entropy (chunked here, on whole logits, PyTorch's own
chunked function) take turns in one process for time; for memory each has a process of its own, and
the figure is how far it raises the peak above inputs and weight. The sizes of a chunk of logits say
what ``_CHUNK_NUMEL`` in ``mtp_lightning/objective/through_head.py`` should be on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cli, harness
from benchmarks.harness import Row
from data_modules.windows import WindowBatch
from mtp_lightning.mtp.feed import Prediction, Together
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective import through_head as loss_module
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.stream import prepass, stream_loss
from mtp_lightning.objective.targets import (
    DepthTarget,
    PositionCounts,
    by_depth,
    count_taught,
)
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.e2e_tv import E2ETV
from mtp_lightning.objective.terms.eal import EAL
from mtp_lightning.objective.terms.js import JS
from mtp_lightning.objective.terms.kl import KL
from mtp_lightning.objective.terms.lk import LK
from mtp_lightning.objective.terms.mixture import Mixture
from mtp_lightning.objective.terms.nla import NLA
from mtp_lightning.objective.terms.reverse_kl import ReverseKL
from mtp_lightning.objective.terms.tv import TV
from mtp_lightning.objective.terms.wtv import WTV
from mtp_lightning.objective.through_head import HeadWeight, through_head
from mtp_lightning.runtime import keep_freed_memory

CHUNK_NUMELS = {"cpu": range(20, 26), "cuda": range(22, 30)}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, *, compiled: bool = False) -> Tensor:
    """This project's loss; ``compiled`` as with compiled blocks on a GPU."""
    target = DepthTarget(0, targets, 1.0 / len(targets), CrossEntropy())
    return stream_loss(weight, Together(hidden, [], {}), [target], compiled=compiled)[0]


def whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The logits of all positions at once, as most code has them."""
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


def inputs(task: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [M, C], the head's weight [V, C] and targets [M]."""
    generator = torch.Generator().manual_seed(0)
    rows, d_model, vocab_size = task["rows"], task["d_model"], task["vocab_size"]
    hidden = torch.randn(rows, d_model, generator=generator).to(task["device"])
    weight = (0.02 * torch.randn(vocab_size, d_model, generator=generator)).to(task["device"])
    targets = torch.randint(vocab_size, (rows,), generator=generator).to(task["device"])
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def loss_pass(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """Forward and backward; the loss."""
    hidden.grad = weight.grad = None
    value = loss(hidden, weight, targets)
    value.backward()
    return float(value.detach())


def measure_memory(task: Row) -> Iterator[Row]:
    """Bytes that one pass of an implementation needs at its peak, beyond what was there before it.

    The gradients of hidden states and weight are part of it. The memory of a first matrix product
    (threads, kernels) is not: a small pass goes first.
    """
    keep_freed_memory()
    loss = implementations()[task["implementation"]]
    loss_pass(loss, *inputs({**task, "rows": 64, "vocab_size": 64}))
    tensors = inputs(task)
    yield {}
    if task["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_pass(loss, *tensors)
        yield {"peak_bytes": torch.cuda.max_memory_allocated() - before}
    else:
        before = harness.current_rss()
        loss_pass(loss, *tensors)
        yield {"peak_bytes": harness.peak_rss() - before}


@contextmanager
def chunk_numel(numel: int, device: str) -> Iterator[None]:
    """The chunk of logits holds ``numel`` numbers, however few rows that is."""
    sizes, rows = dict(loss_module._CHUNK_NUMEL), loss_module._MIN_CHUNK_ROWS
    loss_module._CHUNK_NUMEL[device], loss_module._MIN_CHUNK_ROWS = numel, 1
    try:
        yield
    finally:
        loss_module._CHUNK_NUMEL.update(sizes)
        loss_module._MIN_CHUNK_ROWS = rows


def compare_losses(task: Row, names: Sequence[str], repeats: int) -> list[Row]:
    """One row an implementation: milliseconds and peak memory."""
    tensors = inputs(task)
    losses = implementations()
    functions = {name: partial(loss_pass, losses[name], *tensors) for name in names}
    values = {name: function() for name, function in functions.items()}
    seconds = harness.median_times(functions, repeats=repeats)
    flops = 6 * task["rows"] * task["d_model"] * task["vocab_size"]
    rows = []
    for name in names:
        peak = harness.measure_once(measure_memory, {**task, "implementation": name})["peak_bytes"]
        rows.append(
            {
                "vocab_size": task["vocab_size"],
                "device": task["device"],
                "implementation": name,
                "loss": values[name],
                "ms": seconds[name] * 1e3,
                "time_over_first": seconds[name] / seconds[names[0]],
                "gflops": flops / seconds[name] / 1e9,
                "peak_mb": peak / 1e6,
                "logits_mb": 4 * task["rows"] * task["vocab_size"] / 1e6,
            }
        )
    return rows


def sweep_chunks(task: Row, numels: list[int], repeats: int) -> list[Row]:
    """One row a chunk size, and which one this project takes."""
    tensors, device = inputs(task), task["device"]
    taken = loss_module.chunk_rows(task["vocab_size"], torch.device(device))

    def with_chunk(numel: int) -> None:
        with chunk_numel(numel, device):
            loss_pass(chunked, *tensors)

    candidates: dict[int, int] = {}
    for numel in numels:
        # Larger chunks than the input are all the same one.
        rows = min(max(numel // task["vocab_size"], 1), task["rows"])
        candidates.setdefault(rows, numel)
    seconds = harness.median_times(
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


TERMS: dict[str, Term] = {
    "ce": CrossEntropy(),
    "kl": KL(),
    "reverse_kl": ReverseKL(),
    "js": JS(),
    "tv": TV(),
    "nla": NLA(),
    "lk": LK(),
    "mix{ce, tv}": Mixture({"ce": 0.1, "tv": 0.9}),
    "feature": Mixture({"kl": 0.1, "feature": 1}),
    "e2e_tv": E2ETV(),
    "wtv": WTV(0.7),
    "eal": EAL(),
}


ALONE = "kl, alone"


def head_pass(
    objective: Objective,
    weight_VC: Tensor,
    states: list[Tensor],
    batch: WindowBatch,
    *,
    alone: bool = False,
) -> float:
    """The head's part of a step: as a chain's depths go through it, or one depth after another."""
    weight_VC.grad = None
    # Any stack with the shared head: it says what every depth is asked for.
    vocab_size, d_model = weight_VC.shape
    trunk = TrunkConfig(
        vocab_size=vocab_size, d_model=d_model, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=d_model
    )
    stack = LinearConfig(depth=batch.depth).build(trunk)
    counts = PositionCounts(batch.counts().tolist(), count_taught(batch, stack).tolist())
    factors = [1.0, *[0.1] * batch.depth]
    targets = objective.all_targets(stack, batch, factors, counts, None)
    feed = Together(states[0], list(enumerate(states))[1:], {})
    seen = prepass(weight_VC, feed, targets, objective.measures)
    targets = objective.settle(targets, seen)
    if not alone:
        loss, _ = stream_loss(weight_VC, feed, targets)
        loss.backward()
        return float(loss.detach())
    head = HeadWeight(weight_VC, needs_gradient=True)
    total = 0.0
    for k, own in by_depth(targets).items():
        sums = torch.zeros(len(own), dtype=torch.float64)
        through_head(head, [Prediction(states[k], own)], sums, main_hidden=states[0])
        total += float(sum(t.coefficient * s for t, s in zip(own, sums, strict=True)))
    return total


def compare_objectives(
    vocab_size: int,
    d_model: int,
    depth: int,
    repeats: int,
    names: Sequence[str],
    *,
    windows: int = 8,
) -> list[Row]:
    """One row an objective; the first of ``names`` is what the others are compared with."""
    generator = torch.Generator().manual_seed(0)
    seq_len = 256
    states = [
        torch.randn(windows, seq_len, d_model, generator=generator).requires_grad_()
        for _ in range(depth + 1)
    ]
    weight = (0.05 * torch.randn(vocab_size, d_model, generator=generator)).requires_grad_()
    tokens = torch.randint(vocab_size, (windows, seq_len + depth + 1), generator=generator)
    batch = WindowBatch(tokens, depth)
    functions: dict[str, Callable[[], float]] = {
        name: partial(
            head_pass,
            Objective(term=TERMS["kl" if name == ALONE else name]),
            weight,
            states,
            batch,
            alone=name == ALONE,
        )
        for name in names
    }
    losses = {name: function() for name, function in functions.items()}
    seconds = harness.median_times(functions, repeats=repeats)
    return [
        {
            "vocab_size": vocab_size,
            "depth": depth,
            "objective": name,
            "loss": losses[name],
            "ms": taken * 1e3,
            "over_first": taken / seconds[names[0]],
        }
        for name, taken in seconds.items()
    ]


@cli.command(
    quick={"repeats": 3}, choices={"implementations": list(implementations())}, cpu_time=True
)
def head(
    vocab_sizes: Sequence[int] = (4096, 32768),
    d_model: int | None = None,
    rows: int = 8 * 256,
    repeats: int = 15,
    chunks: Sequence[int] = (),
    implementations: Sequence[str] = tuple(implementations()),
) -> Row:
    """Implementations of one depth's loss, forward and backward, and sizes of its chunks.

    Args:
        d_model: default micro's.
        rows: positions of one depth.
        chunks: numbers in a chunk of logits, as powers of 2; default by device.
        implementations: of the loss.
    """
    d_model = d_model or harness.compose_config(["model=micro"]).model.d_model
    compared, swept = [], []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        numels = [2**power for power in chunks or CHUNK_NUMELS[device]]
        for size in vocab_sizes:
            harness.progress(f"{device}  V={size}")
            task = {"vocab_size": size, "d_model": d_model, "rows": rows, "device": device}
            compared += compare_losses(task, implementations, repeats)
            swept += sweep_chunks(task, numels, repeats)
    cli.print_table(
        f"Forward and backward of one depth's loss, {rows} x {d_model}, fp32",
        "device: device; V: vocab_size ,; implementation: implementation; loss: loss .5f; "
        "ms: ms .1f; over first: time_over_first .2f; GFLOP/s: gflops .0f; "
        "peak MB: peak_mb .0f; whole logits MB: logits_mb .0f",
        compared,
    )
    cli.print_table(
        "Size of a chunk of logits",
        "device: device; V: vocab_size ,; numbers: chunk_numel ,; rows: rows ,; "
        "MB: chunk_mb .1f; ms: ms .1f; over best: over_best .2f; : best; : taken",
        swept,
    )
    return {"d_model": d_model, "repeats": repeats, "implementations": compared, "chunks": swept}


@cli.command(quick={"repeats": 3}, choices={"objectives": [*TERMS, ALONE]}, cpu_time=True)
def objectives(
    vocab_sizes: Sequence[int] = (4096, 32768),
    d_model: int | None = None,
    depth: int = 2,
    repeats: int = 9,
    objectives: Sequence[str] = (*TERMS, ALONE),
) -> Row:
    """Every objective next to cross-entropy: the head for the main prediction and D depths.

    Hidden states of 8 x 256 positions are given. ``alone`` is heads side by side, whose teacher is
    computed again for each.

    Args:
        d_model: default micro's.
        objectives: the first one is compared with.
    """
    d_model = d_model or harness.compose_config(["model=micro"]).model.d_model
    rows = []
    for size in vocab_sizes:
        harness.progress(f"V={size}")
        rows += compare_objectives(size, d_model, depth, repeats, objectives)
    cli.print_table(
        f"Forward and backward of the head, 8 x 256 x {d_model}, D = {depth}, fp32",
        "V: vocab_size ,; objective: objective; ms: ms .1f; over first: over_first .2f",
        rows,
    )
    return {"d_model": d_model, "repeats": repeats, "rows": rows}


main = cli.program(head, objectives)


if __name__ == "__main__":
    keep_freed_memory()  # as the apps do
    main()

"""The shared head: its loss, and the cost of every objective in it.

    python -m benchmarks.head               implementations of the loss, and sizes of its chunks
    python -m benchmarks.head objectives    every objective next to cross-entropy

For time, the implementations of one depth's cross-entropy take turns in one process. For memory,
each has a process of its own, and the figure is the rise of its peak above inputs and weight. The
sizes of a chunk of logits show what ``_CHUNK_NUMEL`` in ``mtp_lightning/objective/through_head.py``
should be on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cli, harness
from benchmarks.harness import Row
from data_modules.windows import WindowBatch
from mtp_lightning.experiment.build import build_objective
from mtp_lightning.mtp.feed import HeadWeight, Prediction, Together
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective import through_head as loss_module
from mtp_lightning.objective.micro_batch import feed_loss, prepass
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.plan import StepPlan, step_counts
from mtp_lightning.objective.targets import DepthTarget, by_depth
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.through_head import through_head
from mtp_lightning.runtime import keep_freed_memory

# Powers of 2: numbers in a chunk of logits.
CHUNK_POWERS = {"cpu": range(20, 26), "cuda": range(22, 30)}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, *, compiled: bool = False) -> Tensor:
    """This project's loss; ``compiled`` as with compiled blocks on a GPU."""
    target = DepthTarget(0, targets, 1.0 / len(targets), CrossEntropy())
    return feed_loss(weight, Together(hidden, [], {}), [target], compiled=compiled)[0]


def whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The logits of all positions at once, as most code has them."""
    return F.cross_entropy(F.linear(hidden, weight), targets)


def pytorch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """``F.linear_cross_entropy`` of torch 2.13, with chunks."""
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return F.linear_cross_entropy(hidden, weight, targets, options=options)  # type: ignore


IMPLEMENTATIONS: dict[str, Loss] = {
    "chunked": chunked,
    "chunked, compiled": partial(chunked, compiled=True),
    "whole logits": whole_logits,
}
if hasattr(F, "linear_cross_entropy"):
    IMPLEMENTATIONS["F.linear_cross_entropy"] = pytorch_chunked


def inputs(task: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [M, C], the head's weight [V, C] and targets [M]."""
    generator = torch.Generator().manual_seed(0)
    rows, d_model, vocab_size = task["rows"], task["d_model"], task["vocab_size"]
    hidden = torch.randn(rows, d_model, generator=generator).to(task["device"])
    weight = (0.02 * torch.randn(vocab_size, d_model, generator=generator)).to(task["device"])
    targets = torch.randint(vocab_size, (rows,), generator=generator).to(task["device"])
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def loss_pass(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """Forward and backward of an implementation; returns the loss."""
    hidden.grad = weight.grad = None
    value = loss(hidden, weight, targets)
    value.backward()
    return float(value.detach())


def measure_memory(task: Row) -> Iterator[Row]:
    """The peak of one pass of an implementation, in bytes beyond the memory before it.

    The gradients of hidden states and weight are part of it. A small pass goes first, so that the
    memory of a process's first matrix product (threads, kernels) is not.
    """
    keep_freed_memory()
    loss = IMPLEMENTATIONS[task["implementation"]]
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


def compare_losses(task: Row, names: Sequence[str], repeats: int) -> list[Row]:
    """A row for each implementation: milliseconds and peak memory."""
    tensors = inputs(task)
    passes = {name: partial(loss_pass, IMPLEMENTATIONS[name], *tensors) for name in names}
    losses = {name: one_pass() for name, one_pass in passes.items()}
    seconds = harness.median_times(passes, repeats=repeats)
    flops = 6 * task["rows"] * task["d_model"] * task["vocab_size"]
    peaks = {
        name: harness.measure_once(measure_memory, {**task, "implementation": name})["peak_bytes"]
        for name in names
    }
    return [
        {
            "vocab_size": task["vocab_size"],
            "device": task["device"],
            "implementation": name,
            "loss": losses[name],
            "ms": seconds[name] * 1e3,
            "time_over_first": seconds[name] / seconds[names[0]],
            "gflops": flops / seconds[name] / 1e9,
            "peak_mb": peaks[name] / 1e6,
            "logits_mb": 4 * task["rows"] * task["vocab_size"] / 1e6,
        }
        for name in names
    ]


def sweep_chunks(task: Row, numels: Sequence[int], repeats: int) -> list[Row]:
    """A row for each chunk size; the fastest and the one that this project takes are marked."""
    tensors, device = inputs(task), task["device"]
    taken = loss_module.chunk_rows(task["vocab_size"], torch.device(device))

    def with_chunk(numel: int) -> None:
        """A pass whose chunks hold ``numel`` logits, however few rows that is."""
        sizes = mock.patch.dict(loss_module._CHUNK_NUMEL, {device: numel})
        with sizes, mock.patch.object(loss_module, "_MIN_CHUNK_ROWS", 1):
            loss_pass(chunked, *tensors)

    numel_of: dict[int, int] = {}
    for numel in numels:
        rows = min(max(numel // task["vocab_size"], 1), task["rows"])
        numel_of.setdefault(rows, numel)  # all chunks larger than the input are one
    passes = {str(rows): partial(with_chunk, numel) for rows, numel in numel_of.items()}
    seconds = harness.median_times(passes, repeats=repeats)
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
        for rows, numel in numel_of.items()
    ]


@cli.command(quick={"repeats": 3}, choices={"implementations": [*IMPLEMENTATIONS]}, cpu_time=True)
def head(
    vocab_sizes: Sequence[int] = (4096, 32768),
    d_model: int = 256,
    rows: int = 8 * 256,
    repeats: int = 15,
    chunks: Sequence[int] = (),
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS),
) -> Row:
    """Implementations of one depth's loss, forward and backward, and sizes of its chunks.

    Args:
        rows: positions of one depth.
        chunks: numbers in a chunk of logits, as powers of 2; default by device.
        implementations: implementations of the loss.
    """
    compared, swept = [], []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        numels = [2**power for power in chunks or CHUNK_POWERS[device]]
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


MIX, ALONE = "mix{ce, tv}", "kl, alone"
OBJECTIVES = ("ce", "kl", "reverse_kl", "js", "tv", "nla", "lk", MIX, "feature", "e2e_tv", "wtv")
OBJECTIVES += ("eal", ALONE)


def objective_of(name: str) -> Objective:
    """An objective of :data:`OBJECTIVES`: one of conf/objective, a mixture, or ``kl``."""
    own = {MIX: ["objective=mix", "objective.terms={ce:0.1,tv:0.9}"], ALONE: ["objective=kl"]}
    return build_objective(harness.compose_config(own.get(name, [f"objective={name}"])))


def objective_pass(
    objective: Objective,
    weight_VC: Tensor,
    states: Sequence[Tensor],
    batch: WindowBatch,
    *,
    alone: bool,
) -> float:
    """The head's part of a step, forward and backward; returns the loss.

    ``states`` are D + 1 hidden states [B, T, C], and the windows give the targets. With ``alone``,
    depths go through the head one after another, not together as a chain's do.
    """
    weight_VC.grad = None
    # A linear stack says what every depth is asked for, as any stack with the shared head does.
    vocab_size, d_model = weight_VC.shape
    trunk = TrunkConfig(
        vocab_size=vocab_size, d_model=d_model, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=d_model
    )
    stack = LinearConfig(depth=batch.depth).build(trunk)
    factors = [1.0, *[0.1] * batch.depth]
    plan = StepPlan(
        lambdas=factors,
        factors=factors,
        counts=step_counts(stack, batch),
        windows=len(batch),
        micro_batches=[batch],
    )
    targets = objective.targets(stack, plan, batch)
    feed = Together(states[0], list(enumerate(states))[1:], {})
    targets = objective.apply_rules(targets, prepass(weight_VC, feed, targets, objective.measures))
    if not alone:
        loss, _ = feed_loss(weight_VC, feed, targets)
        loss.backward()
        return float(loss.detach())
    head, total = HeadWeight(weight_VC, needs_gradient=True), 0.0
    for k, own in by_depth(targets).items():
        sums = torch.zeros(len(own), dtype=torch.float64)
        own = [replace(target, total=part) for target, part in zip(own, sums, strict=True)]
        through_head(head, [Prediction(states[k], own)], main_hidden=states[0])
        total += float(sum(t.coefficient * s for t, s in zip(own, sums, strict=True)))
    return total


def compare_objectives(task: Row, names: Sequence[str], repeats: int) -> list[Row]:
    """A row for each objective, next to the first; the task has V, C, D and the windows."""
    generator = torch.Generator().manual_seed(0)
    vocab_size, depth, seq_len = task["vocab_size"], task["depth"], 256
    shape = task["windows"], seq_len, task["d_model"]
    states = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(depth + 1)]
    weight = 0.05 * torch.randn(vocab_size, task["d_model"], generator=generator)
    weight.requires_grad_()
    tokens = torch.randint(vocab_size, (shape[0], seq_len + depth + 1), generator=generator)
    batch = WindowBatch(tokens, depth)
    passes = {
        name: partial(
            objective_pass, objective_of(name), weight, states, batch, alone=name == ALONE
        )
        for name in names
    }
    losses = {name: one_pass() for name, one_pass in passes.items()}
    seconds = harness.median_times(passes, repeats=repeats)
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


@cli.command(quick={"repeats": 3}, choices={"objectives": OBJECTIVES}, cpu_time=True)
def objectives(
    vocab_sizes: Sequence[int] = (4096, 32768),
    d_model: int = 256,
    depth: int = 2,
    repeats: int = 9,
    objectives: Sequence[str] = OBJECTIVES,
) -> Row:
    """Every objective next to cross-entropy: the head for the main prediction and D depths.

    Hidden states of 8 x 256 positions are given. ``alone`` means heads side by side, each of which
    computes its teacher again.

    Args:
        objectives: the rows; each is compared with the first.
    """
    rows = []
    for size in vocab_sizes:
        harness.progress(f"V={size}")
        task = {"vocab_size": size, "d_model": d_model, "depth": depth, "windows": 8}
        rows += compare_objectives(task, objectives, repeats)
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

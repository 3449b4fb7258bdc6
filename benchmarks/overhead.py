"""Measures the costs of a run besides its optimizer steps.

python -m benchmarks.overhead                small steps next to a bare PyTorch loop
python -m benchmarks.overhead validation     the share of validations, by part
python -m benchmarks.overhead checkpoints    the wait for a sharded model's checkpoint
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import cli, harness
from benchmarks.harness import Row

# Name of a row -> overrides of experiment=star_graph.
CASES: dict[str, list[str]] = {"none": ["mtp=none", "mtp.depth=0"], "parallel, D=3": []}


def run_beside_loop(task: Row) -> Iterator[Row]:
    """A run and a bare loop that take turns in this process.

    The answer lists the CPU milliseconds of a step in each turn: ``run_ms`` and ``bare_ms``.

    Args:
        task: ``overrides``, ``turns``, and ``steps`` a turn.
    """
    import lightning.pytorch as pl

    from benchmarks.workloads import WARMUP_STEPS, prepare_process
    from mtp_lightning.experiment.trainer import build_trainer
    from mtp_lightning.experiment.training import prepare
    from mtp_lightning.processes import Peers
    from mtp_lightning.runtime import quiet_lightning

    warmup, began = 5 * WARMUP_STEPS, 0.0
    run_ms: list[float] = []
    bare_ms: list[float] = []

    class Turns(pl.Callback):
        """Runs a turn of the bare loop after every ``steps`` steps of the run."""

        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            nonlocal began
            done = trainer.global_step - warmup
            if done >= 0 and not done % task["steps"] and len(run_ms) < task["turns"]:
                if done:
                    run_ms.append((harness.clock() - began) / task["steps"] * 1e3)
                    bare_ms.append(bare(task["steps"]) * 1e3)
                began = harness.clock()

    harness.use_cpu_time()
    quiet_lightning()
    prepare_process()
    yield {}
    with tempfile.TemporaryDirectory() as folder:
        cfg = harness.compose_config(
            [
                "experiment=star_graph",
                f"trainer.max_steps={warmup + task['turns'] * task['steps'] + 1}",
                "trainer.val_check_interval=16384",  # none: the bare loop has no validation
                f"paths.output_dir={folder}",
                *task["overrides"],
            ]
        )
        run = prepare(cfg, Path(folder), Peers())
        bare = bare_loop(cfg, run)
        bare(warmup)
        trainer: Any = build_trainer(run.config, resume_step=None, may_skip=False)
        trainer.callbacks.append(Turns())
        trainer.fit(run.module, datamodule=run.data)
    yield {"run_ms": run_ms, "bare_ms": bare_ms}


def bare_loop(cfg: Any, run: Any) -> Callable[[int], float]:
    """A second model trained on the run's batches: number of steps -> seconds of one of them.

    A step is forward passes, cross-entropies, the backward pass, clipping and AdamW, on batches
    that are made before it.
    """
    import torch
    import torch.nn.functional as F

    from mtp_lightning.experiment.instantiate import instantiate
    from mtp_lightning.model import MTPModel
    from mtp_lightning.objective.schedule.base import Progress

    model = MTPModel(run.module.model.config)
    model.initialize(cfg.seed)
    optimizer = instantiate(cfg.optimizer).build(model)
    parameters = list(model.parameters())
    weights = [1.0, *run.module.schedule.lambdas(Progress(step=0, max_steps=1))]
    batches = iter(run.data.train_dataloader())

    def steps(n: int) -> float:
        made = [next(batches) for _ in range(n)]
        targets = [[batch.targets(k).flatten() for k in range(len(weights))] for batch in made]
        began = harness.clock()
        for batch, targets_K in zip(made, targets, strict=True):
            states = model(batch)
            losses = [
                weight * F.cross_entropy(model.head(states[k]).flatten(0, 1), targets_K[k])
                for k, weight in enumerate(weights)
            ]
            torch.stack(losses).sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, cfg.trainer.gradient_clip_val)
            optimizer.step()
            optimizer.zero_grad()
        return (harness.clock() - began) / n

    return steps


@cli.command(quick={"turns": 2, "repeats": 1}, choices={"cases": list(CASES)})
def overhead(
    cases: Sequence[str] = tuple(CASES),
    steps: int = 20,
    turns: int = 8,
    repeats: int = 3,
    overrides: Sequence[str] = (),
) -> Row:
    """Small steps of a run next to a bare PyTorch loop with the same model and batches.

    The run is that of ``train.py experiment=star_graph``: Lightning's Trainer with the default
    callbacks and loggers. CPU time of one thread is counted.

    Args:
        cases: the rows.
        steps: steps a turn.
        turns: turns of a process.
        overrides: overrides of the config, for all rows.
    """
    sides = {}
    for case in cases:
        task: Row = {"name": case, "overrides": [*CASES[case], *overrides]}
        task |= {"turns": turns, "steps": steps}
        sides[case] = partial(harness.measure_once, run_beside_loop, task)
    runs = harness.take_turns(sides, repeats)
    rows = [beside_loop(case, done) for case, done in runs.items()]
    cli.print_table(
        "Steps of experiment=star_graph, 4 layers x 64, batch 64, one thread, CPU time",
        "mtp: case; ms: ms .1f; steps/s: steps_per_second .1f; bare ms: bare_ms .1f; "
        "bare steps/s: bare_steps_per_second .1f; run/bare: ratio .3f",
        rows,
    )
    return {"rows": rows, "runs": runs}


def beside_loop(case: str, runs: Sequence[Row]) -> Row:
    """A row of ``overhead``: medians over all turns of all processes, and of the turns' ratios."""
    run_ms = [ms for run in runs for ms in run["run_ms"]]
    bare_ms = [ms for run in runs for ms in run["bare_ms"]]
    run, bare = statistics.median(run_ms), statistics.median(bare_ms)
    row = {"case": case, "ms": run, "bare_ms": bare, "ratio": harness.ratio(run_ms, bare_ms)}
    return row | {"steps_per_second": 1e3 / run, "bare_steps_per_second": 1e3 / bare}


@cli.command(quick={"steps": 2}, cpu_time=True)
def validation(
    overrides: Sequence[str] = (), /, experiment: str = "star_graph", steps: int = 20
) -> Row:
    """The share of validations in a preset's whole run, by part.

    The run is shortened to three validations; the first, which makes the examples, is left out. The
    shares of the whole run follow from the seconds of a step and of a validation.

    Args:
        experiment: the preset.
        steps: steps between two validations.
    """
    from mtp_lightning.callbacks.exact_match import ExactMatch
    from mtp_lightning.callbacks.speculative_eval import SpeculativeEval
    from mtp_lightning.experiment.training import train
    from mtp_lightning.module import MTPModule

    chosen = [f"experiment={experiment}", *overrides]
    whole = harness.compose_config(chosen).trainer
    parts = {
        "a training step": [(MTPModule, "training_step")],
        "a validation's losses": [(MTPModule, "validation_step")],
        "its answers (exact_match)": [(ExactMatch, "on_validation_epoch_end")],
        "its drafts (speculative_eval)": [(SpeculativeEval, "on_validation_epoch_end")],
    }
    folders = tempfile.TemporaryDirectory(prefix="mtp-bench-")
    with folders as folder, harness.timed_calls(parts) as seconds:
        short = [f"trainer.max_steps={3 * steps}", f"trainer.val_check_interval={steps}"]
        train(harness.compose_config([*chosen, *short, "logger=csv", f"paths.output_dir={folder}"]))
    rows: list[Row] = []
    for what, took in seconds.items():
        if what == "a training step":
            once, times = statistics.mean(took[steps:]), whole.max_steps
        else:
            once = sum(took[len(took) // 3 :]) / 2  # the second and third validation
            times = whole.max_steps // whole.val_check_interval
        rows.append({"what": what, "seconds": once, "total": once * times})
    total = sum(row["total"] for row in rows)
    rows = [{**row, "share": row["total"] / total} for row in rows]
    columns = "what: what; seconds each: seconds .3f; of the whole run: share .1%"
    cli.print_table(f"experiment={experiment}", columns, rows)
    return {"rows": rows}


_PROCESSES = 2


def save_sharded(task: Row) -> Iterator[Row]:
    """One save, in one of two processes (gloo) with half a model and half of AdamW's state each.

    The answer has the seconds that the training waits (``waits_s``) and after which the checkpoint
    has its name (``named_s``), the memory beyond the process's half (``beside_bytes``) and, for
    parts, the rate of matrix products meanwhile over that without (``steps_meanwhile``).

    Args:
        task: ``rank``; ``way``: ``file``, which the first process gathers, or ``parts``;
            ``megabytes`` of the checkpoint; ``folder`` for it.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    from mtp_lightning.distributed.shard_files import ShardWriting
    from mtp_lightning.distributed.sharding import build_mesh, gathered
    from mtp_lightning.run import checkpoints as files

    yield {}  # before the processes wait for each other
    torch.set_num_threads(1)
    folder, width = Path(task["folder"]), 1024
    meeting = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", meeting, rank=task["rank"], world_size=_PROCESSES)
    mesh = build_mesh("cpu", _PROCESSES, None)
    rows = task["megabytes"] * 1_000_000 // (4 * width * 3 * 8)

    def sharded() -> torch.Tensor:
        return distribute_tensor(torch.randn(rows, width), mesh, [Shard(0)])

    moments = {i: {"exp_avg": sharded(), "exp_avg_sq": sharded()} for i in range(8)}
    state: Row = {
        "global_step": 1,
        "state_dict": {f"w{i}": sharded() for i in range(8)},
        "optimizer_states": [{"state": moments, "param_groups": []}],
    }
    left, right = torch.randn(512, 512), torch.randn(512, 512)

    def products(over: Callable[[], bool]) -> float:
        """Matrix products a second, until ``over`` returns True."""
        done, began = 0, time.perf_counter()
        while not over():
            for _ in range(10):
                left @ right
            done += 10
        return done / (time.perf_counter() - began)

    end = time.perf_counter() + 2.0
    alone = products(lambda: time.perf_counter() > end)
    dist.barrier()
    path, result = folder / "last.ckpt", {}
    with peak_beside() as peak:
        began = time.perf_counter()
        if task["way"] == "file":
            whole = {**state, **{k: gathered(state[k]) for k in ("state_dict", "optimizer_states")}}
            if task["rank"] == 0:
                files.save(whole, path)
            dist.barrier()
            result["waits_s"] = result["named_s"] = time.perf_counter() - began
        else:
            writing = ShardWriting(state, path, mesh, dist.group.WORLD)
            result["waits_s"] = time.perf_counter() - began
            meanwhile = products(lambda: writing.ended(wait=False))
            result["named_s"] = time.perf_counter() - began
            result["steps_meanwhile"] = meanwhile / alone
    assert files.intact(path)
    dist.destroy_process_group()
    yield {**result, "beside_bytes": peak[0]}


@contextmanager
def peak_beside() -> Iterator[list[int]]:
    """The peak of this process's own memory in the block, beyond what it had before, in bytes."""
    before, over = harness.private_rss(), threading.Event()
    most = [0]

    def look() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], harness.private_rss() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def save_once(way: str, megabytes: int) -> Row:
    """The first process's answer to :func:`save_sharded`, in a folder of temporary files."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        task = {"way": way, "megabytes": megabytes, "folder": folder}
        workers = [
            stack.enter_context(harness.Worker(save_sharded, {**task, "rank": rank}))
            for rank in range(_PROCESSES)
        ]
        with ThreadPoolExecutor(_PROCESSES) as pool:
            return next(pool.map(harness.Worker.turn, workers))


@cli.command(quick={"rounds": 1})
def checkpoints(megabytes: int = 600, rounds: int = 5) -> Row:
    """The wait for a checkpoint of a sharded model, as one file and in parts.

    Args:
        megabytes: size of the checkpoint.
        rounds: saves of each kind, in turns; figures are medians over them.
    """
    ways = {way: partial(save_once, way, megabytes) for way in ("file", "parts")}
    found = harness.take_turns(ways, rounds, say=f"{megabytes} MB")
    result = {way: harness.medians(own) for way, own in found.items()}
    cli.print_table(
        f"Saving {megabytes} MB from {_PROCESSES} processes",
        "as: way; training waits, s: waits_s .2f; named after, s: named_s .2f; "
        "rate meanwhile: steps_meanwhile .2f; besides its half, bytes: beside_bytes ,.0f",
        [{"way": way, **own} for way, own in result.items()],
    )
    return result


main = cli.program(overhead, validation, checkpoints)

if __name__ == "__main__":
    main()

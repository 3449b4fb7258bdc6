"""What a run of many small steps costs over a bare PyTorch loop with the same model and batches.

    python -m benchmarks.overhead [--base COMMIT] [--profile]

The run is that of ``train.py``: Lightning's Trainer with the default callbacks and loggers
(``experiment=star_graph``: 4 layers x 64, batch 64, one thread). The bare loop has forward passes,
cross-entropies, the backward pass, clipping and AdamW, on batches made beforehand. Both train in
one process and take turns; CPU time is counted. With ``--base`` the code of a commit is measured,
too, its processes in turn with the working tree's. ``--profile`` says where a step's time goes.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cli, harness
from benchmarks.harness import Row

_WARMUP_STEPS = 10
_PROFILED_STEPS = 20

# Name of a row -> overrides.
CASES: dict[str, list[str]] = {
    "none": ["mtp=none", "mtp.depth=0"],
    "parallel, D=3": [],
}


def measure(task: Row) -> Iterator[Row]:
    """CPU milliseconds of a step in every turn, of the run and of the bare loop.

    Args:
        task: ``overrides``, ``turns``, ``steps`` a turn, and ``profile``.
    """
    import lightning.pytorch as pl

    from benchmarks.workloads import prepare_process
    from mtp_lightning.experiment.build import build_trainer
    from mtp_lightning.experiment.training import prepare
    from mtp_lightning.runtime import quiet_lightning

    measured = _WARMUP_STEPS + task["turns"] * task["steps"]

    class Turns(pl.Callback):
        """``steps`` whole steps of the run lie between two turns of the bare loop."""

        def __init__(self, other: Callable[[int], float]) -> None:
            self.other = other
            self.began = 0.0
            self.run_ms: list[float] = []
            self.bare_ms: list[float] = []
            self.watch: Any = None
            self.spans: Any = None

        def on_train_batch_start(self, trainer: Any, module: Any, *rest: Any) -> None:
            done = trainer.global_step - _WARMUP_STEPS
            if done >= 0 and not done % task["steps"] and len(self.run_ms) < task["turns"]:
                if done:
                    self.run_ms.append((harness.clock() - self.began) / task["steps"] * 1e3)
                    self.bare_ms.append(self.other(task["steps"]) * 1e3)
                self.began = harness.clock()
            if task["profile"]:
                self.profile(trainer, module)

        def profile(self, trainer: Any, module: Any) -> None:
            from benchmarks import profiles

            if trainer.global_step == measured + 1:
                self.watch = profiles.Watch(profiles.LIGHTNING)
                self.spans = profiles.run_spans(trainer, module)
                self.spans.__enter__()
                self.watch.start()
            elif trainer.global_step == measured + 1 + _PROFILED_STEPS:
                self.watch.stop()
                self.spans.__exit__(None, None, None)

    harness.use_cpu_time()
    quiet_lightning()
    prepare_process()
    yield {}
    with tempfile.TemporaryDirectory() as folder:
        cfg = harness.compose_config(
            [
                "experiment=star_graph",
                f"trainer.max_steps={measured + _PROFILED_STEPS + 2}",
                # No validation: the bare loop has none.
                "trainer.val_check_interval=16384",
                f"paths.output_dir={folder}",
                *task["overrides"],
            ]
        )
        run = prepare(cfg, Path(folder))
        bare = bare_loop(cfg, run)
        bare(_WARMUP_STEPS)
        trainer: Any = build_trainer(run.config, resume_step=None, may_skip=False)
        trainer.callbacks.append(turns := Turns(bare))
        trainer.fit(run.module, datamodule=run.data)
    found: Row = {"run_ms": turns.run_ms, "bare_ms": turns.bare_ms}
    yield found | ({"profile": turns.watch.rows(_PROFILED_STEPS)} if task["profile"] else {})


def bare_loop(cfg: Any, run: Any) -> Callable[[int], float]:
    """A second model on the run's batches: a number of steps -> seconds of one of them."""
    import torch
    import torch.nn.functional as F

    from mtp_lightning.experiment.instantiate import instantiate
    from mtp_lightning.model import MTPModel
    from mtp_lightning.objective.schedule.base import Progress

    model = MTPModel(run.module.model.config)
    model.initialise(cfg.seed)
    optimizer = instantiate(cfg.optimizer).build(model)
    parameters = list(model.parameters())
    weights = [1.0, *run.module.schedule.weights(Progress(step=0, max_steps=1))]
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


def combine(case: str, code: str, runs: Sequence[Row]) -> Row:
    """One row: medians over all turns of all processes, and of the turns' ratios."""
    run_ms = [ms for run in runs for ms in run["run_ms"]]
    bare_ms = [ms for run in runs for ms in run["bare_ms"]]
    run, bare = statistics.median(run_ms), statistics.median(bare_ms)
    return {
        "case": case,
        "code": code,
        "ms": run,
        "bare_ms": bare,
        "steps_per_second": 1e3 / run,
        "bare_steps_per_second": 1e3 / bare,
        "ratio": harness.ratio(run_ms, bare_ms),
    }


def compare(rows: Sequence[Row]) -> None:
    """Add how many times as fast each row is as the first of its case."""
    first: dict[str, float] = {}
    for row in rows:
        row["speedup"] = first.setdefault(row["case"], row["ms"]) / row["ms"]


@cli.command(quick={"turns": 2, "repeats": 1}, choices={"cases": list(CASES)})
def overhead(
    cases: Sequence[str] = tuple(CASES),
    base: str | None = None,
    profile: bool = False,
    steps: int = 20,
    turns: int = 8,
    repeats: int = 3,
    overrides: Sequence[str] = (),
) -> Row:
    """A run next to a bare loop.

    Args:
        cases: rows.
        base: a commit whose code is measured next to the working tree's.
        profile: say where the time of a step goes.
        steps: a turn.
        turns: a process.
        overrides: of the config, for all cases.
    """
    trees = {"working tree": harness.ROOT}
    if base:
        from benchmarks.against import built_tree, commit_of

        trees = {base: built_tree(commit_of(base)), **trees}
    runs: dict[tuple[str, str], list[Row]] = {}
    for repeat in range(repeats):
        for case, (code, tree) in itertools.product(cases, trees.items()):
            harness.progress(f"{repeat + 1} of {repeats}: {case}, {code}")
            watched = profile and tree == harness.ROOT and repeat == 0
            task = {"overrides": [*CASES[case], *overrides], "turns": turns, "steps": steps}
            done = harness.measure_once(measure, {**task, "profile": watched}, tree=tree)
            runs.setdefault((case, code), []).append(done)
    rows = [combine(case, code, done) for (case, code), done in runs.items()]
    compare(rows)
    cli.print_table(
        "Steps of experiment=star_graph, 4 layers x 64, batch 64, one thread, CPU time",
        "mtp: case; code: code; ms: ms .1f; steps/s: steps_per_second .1f; "
        "bare ms: bare_ms .1f; bare steps/s: bare_steps_per_second .1f; run/bare: ratio .3f; "
        "times as fast: speedup .2f",
        rows,
    )
    profiled = {
        case: done[0]["profile"] for (case, _), done in runs.items() if "profile" in done[0]
    }
    for case, parts in profiled.items():
        from benchmarks import profiles

        profiles.show(f"Where the time of a step goes, {case}", parts)
    processes = [{"case": case, "code": code, "runs": done} for (case, code), done in runs.items()]
    return {"rows": rows, "profiles": profiled, "runs": processes}


main = cli.program("overhead", __doc__, overhead)


if __name__ == "__main__":
    main()

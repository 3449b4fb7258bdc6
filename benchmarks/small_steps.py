"""How fast a run of many small steps is, beside the same model and batches in a bare PyTorch loop.

Run ``python -m benchmarks.small_steps``. The run is that of ``train.py``: Lightning's Trainer with
the default callbacks and loggers (``experiment=star_graph``, nano: 4 layers x 64, batch 64, one
thread). The bare loop is forward, cross-entropies, backward, clipping and AdamW, nothing else, on
batches made beforehand. Both train in one process and take turns; counted is CPU time, so that
others on the machine cost little. ``--base COMMIT`` measures the code of a commit, too, its
processes in turn with those of the working tree. ``--profile`` says where a step's time goes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

_WARMUP_STEPS = 10
_PROFILED_STEPS = 20

# Name of a row -> its words on the command line.
CASES: dict[str, list[str]] = {
    "none": ["mtp=none", "mtp.depth=0"],
    "parallel, D=3": [],
}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One case in this process, with the code that it imports.

    Args:
        task: ``overrides``, ``turns``, ``steps`` a turn, ``profile``.

    Returns:
        CPU milliseconds of a step of every turn, of the run (``run_ms``) and of the bare loop
        (``bare_ms``); ``profile``, if asked for.
    """
    import lightning.pytorch as pl

    from mtp_lightning.experiment.build import build_trainer
    from mtp_lightning.experiment.training import prepare
    from mtp_lightning.runtime import keep_freed_memory, quiet_lightning

    class Turns(pl.Callback):
        """Between two of its calls lie ``steps`` whole steps of the run."""

        def __init__(self, other: Callable[[int], float]) -> None:
            self.other = other
            self.began = 0.0
            self.run_ms: list[float] = []
            self.bare_ms: list[float] = []

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            done = trainer.global_step - _WARMUP_STEPS
            if done < 0 or done % task["steps"] or len(self.run_ms) == task["turns"]:
                return
            if done:
                self.run_ms.append((common.clock() - self.began) / task["steps"] * 1e3)
                self.bare_ms.append(self.other(task["steps"]) * 1e3)
            self.began = common.clock()

    common.use_cpu_time()
    quiet_lightning()
    keep_freed_memory()
    measured = _WARMUP_STEPS + task["turns"] * task["steps"]
    with tempfile.TemporaryDirectory() as folder:
        cfg = common.compose_config(
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
        if task["profile"]:
            from benchmarks.step_profile import StepProfile

            trainer.callbacks.append(watch := StepProfile(measured + 1, _PROFILED_STEPS))
        trainer.fit(run.module, datamodule=run.data)
    result = {"run_ms": turns.run_ms, "bare_ms": turns.bare_ms}
    return result | ({"profile": watch.rows()} if task["profile"] else {})


def bare_loop(cfg: Any, run: Any) -> Callable[[int], float]:
    """A model of its own on the run's batches: n steps -> seconds of one of them."""
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
        began = common.clock()
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
        return (common.clock() - began) / n

    return steps


def run_child(tree: Path, task: dict[str, Any]) -> dict[str, Any]:
    """:func:`measure` by the code of ``tree``, whatever this process has imported.

    Raises:
        RuntimeError: the child failed; with the end of what it printed.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--child", json.dumps(task)]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tree}, {task} failed:\n{done.stdout}{done.stderr}"[-4000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def combine(case: str, code: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row: medians over all turns of all processes, and of the turns' ratios."""
    run_ms = [ms for run in runs for ms in run["run_ms"]]
    bare_ms = [ms for run in runs for ms in run["bare_ms"]]
    run, bare = statistics.median(run_ms), statistics.median(bare_ms)
    ratios = [a / b for a, b in zip(run_ms, bare_ms, strict=True)]
    return {
        "case": case,
        "code": code,
        "ms": run,
        "bare_ms": bare,
        "steps_per_second": 1e3 / run,
        "bare_steps_per_second": 1e3 / bare,
        "ratio": statistics.median(ratios),
    }


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add how many times as fast every row is as the first of its case."""
    first: dict[str, float] = {}
    for row in rows:
        before = first.setdefault(row["case"], row["ms"])
        row["speedup"] = before / row["ms"]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the tables, writes the JSON and returns it."""
    parser = common.parser("Measures small steps of a run and of a bare loop.", "small_steps")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--base", help="a commit whose code is measured beside the working tree's")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--steps", type=int, default=20, help="a turn; default 20")
    parser.add_argument("--turns", type=int, help="a process; default 8, with --quick 2")
    parser.add_argument("--repeats", type=int, help="processes; default 3, with --quick 1")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the config, for all cases")
    options = parser.parse_args(arguments)
    if options.child:
        result = measure(json.loads(options.child))
        print(json.dumps(result), flush=True)
        return result
    with tempfile.TemporaryDirectory() as scratch:
        trees = {"working tree": common.ROOT}
        if options.base:
            from benchmarks.same_bits import unpack

            trees = {options.base: unpack(options.base, Path(scratch)), **trees}
        runs = run_in_turns(trees, options)
    rows = [combine(case, code, done) for (case, code), done in runs.items()]
    compare(rows)
    result = {
        "benchmark": "small_steps",
        "steps": options.steps,
        "rows": rows,
        "profiles": {
            case: done[0]["profile"] for (case, _), done in runs.items() if "profile" in done[0]
        },
        "runs": [{"case": c, "code": code, "runs": done} for (c, code), done in runs.items()],
        "machine": common.machine(),
    }
    print_rows(result)
    common.write_json(result, options.output)
    return result


def run_in_turns(
    trees: dict[str, Path], options: argparse.Namespace
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What every process measured, by case and code."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    repeats = options.repeats or (1 if options.quick else 3)
    for repeat in range(repeats):
        for case in options.cases:
            for code, tree in trees.items():
                common.progress(f"{repeat + 1}/{repeats}  {case}, {code}")
                task = {
                    "overrides": [*CASES[case], *options.overrides],
                    "turns": options.turns or (2 if options.quick else 8),
                    "steps": options.steps,
                    "profile": options.profile and tree == common.ROOT and repeat == 0,
                }
                runs.setdefault((case, code), []).append(run_child(tree, task))
    return runs


def print_rows(result: dict[str, Any]) -> None:
    """The tables."""
    common.print_table(
        "Steps of data=star_graph, 4 layers x 64, batch 64, one thread, CPU time",
        {
            "mtp": "case",
            "code": "code",
            "ms": "ms|.1f",
            "steps/s": "steps_per_second|.1f",
            "bare ms": "bare_ms|.1f",
            "bare steps/s": "bare_steps_per_second|.1f",
            "run/bare": "ratio|.3f",
            "times as fast": "speedup|.2f",
        },
        result["rows"],
    )
    for case, rows in result["profiles"].items():
        common.print_table(
            f"Where the time of a step goes, {case} (the profiler slows it down)",
            {"part": "part", "ms": "ms|.2f", "share": "share|.1%"},
            rows,
        )


if __name__ == "__main__":
    main()

"""What an optimizer step costs, in time and memory, by number of MTP depths and vocabulary.

Run ``python -m benchmarks.train_step``. One step is what a run does, without Lightning, callbacks
and logging around it. Every configuration is measured in processes of its own (``--repeats`` of
them, the configurations taking turns), so that its peak memory is its own. Between the steps the
process measures its matrix-product rate: ``torch.matmul`` of 1024^3, which is MKL's on an x86 CPU,
and the fastest one it has (``mtp_lightning.cpu``: oneDNN where that is faster). FLOPs count
attention in full, without a causal discount, as the other libraries' figures do. ``--profile`` says
instead where the step of nano, micro, tiny and a task's model goes, by kind of layer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks import common

MODULE = "benchmarks.train_step"
SIZE = 1024
_WARMUP_STEPS = 2

# Steps that are profiled: the main job's, two of the tables', and a task's (star_graph).
PROFILED: dict[str, dict[str, Any]] = {
    "nano": {"vocab_size": 1024, "depth": 2, "batch_size": 4, "seq_len": 256},
    "micro": {"vocab_size": 4096, "depth": 2, "batch_size": 8, "seq_len": 256},
    "tiny": {"vocab_size": 4096, "depth": 2, "batch_size": 4, "seq_len": 256},
    "pico": {"vocab_size": 64, "depth": 3, "batch_size": 64, "seq_len": 24, "mtp": "parallel"},
}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One configuration in this process.

    Args:
        task: ``model``, ``vocab_size``, ``depth``, ``batch_size``, ``seq_len``, ``steps``,
            ``keep_freed_memory``.

    Returns:
        Milliseconds of every step and rates after it; bytes of memory; the model's costs.
    """
    import torch

    from mtp_lightning.nn.ops import matmul_transposed
    from mtp_lightning.runtime import keep_freed_memory

    if task["keep_freed_memory"]:
        keep_freed_memory()
    step, model, module_forward = build_step(task)
    rss_built = common.current_rss()

    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    step_seconds, matmul_seconds, fastest_seconds = [], [], []
    for index in range(_WARMUP_STEPS + task["steps"]):
        began = common.clock()
        loss = step()
        seconds = common.clock() - began
        if index < _WARMUP_STEPS:
            continue
        step_seconds.append(seconds)
        rates = common.median_times(
            {"matmul": lambda: torch.matmul(a, b), "fastest": lambda: matmul_transposed(a, b)},
            repeats=3,
        )
        matmul_seconds.append(rates["matmul"])
        fastest_seconds.append(rates["fastest"])
    peak = common.peak_rss()  # before the count below, which is not part of a run

    saved = common.SavedTensors(list(model.parameters()))
    with saved.counting():
        hidden_bytes, total = module_forward()
    total.backward()
    config, flops_of_matmul = model.config, 2 * SIZE**3
    return {
        "loss": float(loss),
        "parameters": config.num_params(),
        "gflop_per_step": task["flops_per_token"] * task["batch_size"] * task["seq_len"] / 1e9,
        "ms_per_step": statistics.median(step_seconds) * 1e3,
        "matmul_gflops": flops_of_matmul / statistics.median(matmul_seconds) / 1e9,
        "fastest_gflops": flops_of_matmul / statistics.median(fastest_seconds) / 1e9,
        "rss_imported": task.get("rss_imported"),
        "rss_built": rss_built,
        "rss_peak": peak,
        # Parameters, gradients, and AdamW's two moments.
        "state_bytes": 4 * sum(p.numel() * p.element_size() for p in model.parameters()),
        # What autograd keeps for backward, and what the loss keeps beside it: the gradients of
        # the hidden states, which it makes in its forward pass.
        "saved_bytes": saved.n_bytes + hidden_bytes,
    }


def build_step(task: dict[str, Any]) -> tuple[Callable[[], Any], Any, Callable[[], Any]]:
    """One optimizer step of a run with this config, the model, and the step's forward pass.

    On the CPU, or on the task's ``device``.
    """
    import torch

    from data_modules.windows import WindowBatch
    from mtp_lightning.experiment.build import build_model_config, build_objective
    from mtp_lightning.experiment.instantiate import instantiate
    from mtp_lightning.model import MTPModel
    from mtp_lightning.objective.balance.base import NoBalance
    from mtp_lightning.objective.schedule.base import Progress
    from mtp_lightning.objective.step import OptimizerStep

    cfg = common.compose_config(
        [
            f"model={task['model']}",
            f"mtp={task.get('mtp', 'sequential')}",
            f"mtp.depth={task['depth']}",
            f"data.seq_len={task['seq_len']}",
            f"data.batch_size={task['batch_size']}",
            "lambda_schedule=constant",
            *task.get("overrides", []),
        ]
    )
    # After all imports, before anything of the model: what a process weighs by itself.
    task["rss_imported"] = common.current_rss()
    model = MTPModel(build_model_config(cfg, task["vocab_size"]))
    model.initialise(cfg.seed)
    model.to(task.get("device", "cpu"))
    optimizer = instantiate(cfg.optimizer).build(model)
    one_step = OptimizerStep(
        model,
        schedule=instantiate(cfg.lambda_schedule),
        balance=NoBalance(task["depth"]),
        objective=build_objective(cfg),
        seed=cfg.seed,
        clip_norm=cfg.trainer.gradient_clip_val,
    )
    task["flops_per_token"] = one_step.flops_per_token(task["seq_len"])
    progress = Progress(step=0, max_steps=cfg.trainer.max_steps)
    mtp, depth = model.config.mtp, task["depth"]
    extra = max(mtp.places_ahead - depth - 1, 0)
    width = task["seq_len"] + mtp.stride * depth + 1 + extra
    shape = (task["batch_size"], width)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(task["vocab_size"], shape, generator=generator)
    batch = WindowBatch(tokens, depth, stride=mtp.stride, extra=extra)
    batch = batch.to(task.get("device", "cpu"))

    def step() -> torch.Tensor:
        return one_step(batch, progress, optimizer).loss

    def forward() -> tuple[int, torch.Tensor]:
        plan = one_step.plan(batch, progress)
        loss, _, _ = one_step.loss(plan, *plan.micro_batches[0])
        counts = plan.counts.valid
        d_model, element = model.config.trunk.d_model, next(model.parameters()).element_size()
        return sum(counts) * d_model * element, loss

    return step, model, forward


def measure_profile(task: dict[str, Any]) -> dict[str, Any]:
    """Where the steps of one model go, in this process.

    Args:
        task: as :func:`measure` has it, and ``threads``.
    """
    import torch

    from benchmarks import layer_profile
    from mtp_lightning.runtime import keep_freed_memory

    torch.set_num_threads(task["threads"])
    keep_freed_memory()
    step, _, _ = build_step(task)
    for _ in range(_WARMUP_STEPS):
        step()
    seconds = layer_profile.median_step(step, 2 * task["steps"])
    rows = layer_profile.measure(step, seconds_per_step=seconds, n_steps=task["steps"])
    gflop = task["flops_per_token"] * task["batch_size"] * task["seq_len"] / 1e9
    return {"ms_per_step": seconds * 1e3, "gflop_per_step": gflop, "rows": rows}


def profiles(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the profiles of all models and threads, prints and writes them."""
    from benchmarks.layer_profile import print_rows as print_profile

    done = []
    for threads in [1] if options.cpu_time else options.threads:
        for name in options.profile or PROFILED:
            common.progress(f"profile of {name}, {threads} threads")
            steps = options.steps or (2 if options.quick else 10)
            task = {"model": name, "threads": threads, "steps": steps, **PROFILED[name]}
            found = common.run_child(MODULE, {**task, "profile": True})
            done.append({"model": name, "threads": threads, **found})
    result = {"benchmark": "train_step --profile", "profiles": done, "machine": common.machine()}
    for found in done:
        threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
        print_profile(
            f"A step of model={found['model']}, {threads}: {found['ms_per_step']:.1f} ms",
            found["rows"],
        )
    common.write_json(result, options.output)
    return result


def combine(task: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of one configuration's processes, and what follows from them."""
    row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    row |= {key: task[key] for key in ("vocab_size", "depth")}
    row["parameters"] = runs[0]["parameters"]
    tokens = task["batch_size"] * task["seq_len"]
    row["ms_slowest"] = max(run["ms_per_step"] for run in runs)
    row["ms_fastest"] = min(run["ms_per_step"] for run in runs)
    row["tokens_per_second"] = tokens / row["ms_per_step"] * 1e3
    row["gflops"] = row["gflop_per_step"] / row["ms_per_step"] * 1e3
    # Ratios are taken inside each process, then their median.
    for name in ("matmul", "fastest"):
        row[f"ratio_to_{name}"] = statistics.median(
            run["gflop_per_step"] / run["ms_per_step"] * 1e3 / run[f"{name}_gflops"] for run in runs
        )
    row["beyond_state"] = row["rss_peak"] - row["rss_imported"] - row["state_bytes"]
    row["transient"] = row["beyond_state"] - row["saved_bytes"]
    return row


def compare(row: dict[str, Any], plain: dict[str, Any]) -> None:
    """Add what D costs over D = 0 (``plain``), by FLOPs and by memory."""
    share = row["gflop_per_step"] / plain["gflop_per_step"]
    row["flops_over_plain"] = share
    row["time_over_plain"] = row["ms_per_step"] / plain["ms_per_step"]
    row["cost_over_share"] = row["time_over_plain"] / share
    # The same, by the rate of matrix products that each process saw: for a busy machine.
    row["cost_over_share_by_rate"] = plain["ratio_to_fastest"] / row["ratio_to_fastest"]
    own = row["state_bytes"] - plain["state_bytes"] + row["saved_bytes"] - plain["saved_bytes"]
    row["peak_over_plain"] = row["rss_peak"] / plain["rss_peak"]
    row["peak_over_plain_without_own"] = (row["rss_peak"] - own) / plain["rss_peak"]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the tables, writes the JSON and returns it."""
    parser = common.parser("Measures an optimizer step.", "train_step")
    parser.add_argument("--model", default="micro", help="a size of conf/model")
    parser.add_argument("--depths", type=common.whole_numbers, default=[0, 1, 2, 4])
    parser.add_argument("--vocab-sizes", type=common.whole_numbers, default=[4096, 32768])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, help="a process; default 12, with --quick 4")
    parser.add_argument("--repeats", type=int, help="processes; default 3, with --quick 1")
    parser.add_argument(
        "--profile",
        nargs="*",
        choices=list(PROFILED),
        help="where the time of a step goes, of these models; alone: of all",
    )
    parser.add_argument("--threads", type=common.whole_numbers, default=[1, 2], help="of profiles")
    common.add_cpu_time(parser)
    options = parser.parse_args(arguments)
    if options.cpu_time:
        common.use_cpu_time()
    if options.profile is not None:
        return profiles(options)
    if options.child:
        task = json.loads(options.child)
        result = measure_profile(task) if task.get("profile") else measure(task)
        common.answer_parent(result)
        return result
    steps = options.steps or (4 if options.quick else 12)
    repeats = options.repeats or (1 if options.quick else 3)

    tasks = [
        {
            "model": options.model,
            "vocab_size": vocab_size,
            "depth": depth,
            "batch_size": options.batch_size,
            "seq_len": options.seq_len,
            "steps": steps,
            "keep_freed_memory": True,
        }
        for vocab_size in options.vocab_sizes
        for depth in options.depths
    ]
    runs: list[list[dict[str, Any]]] = [[] for _ in tasks]
    loads = []
    for repeat in range(repeats):
        for task, done in zip(tasks, runs, strict=True):
            common.progress(
                f"{repeat + 1}/{repeats}  V={task['vocab_size']} D={task['depth']}, {steps} steps"
            )
            done.append(common.run_child(MODULE, task))
            loads.append(os.getloadavg()[0])
    rows = [combine(task, done) for task, done in zip(tasks, runs, strict=True)]
    for row in rows:
        for plain in rows:
            if plain["depth"] == 0 and plain["vocab_size"] == row["vocab_size"]:
                compare(row, plain)
    result = {
        "benchmark": "train_step",
        "model": options.model,
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "steps": steps,
        "repeats": repeats,
        "rows": rows,
        "runs": runs,
        "load_average_highest": max(loads),
        "machine": common.machine(),
    }
    print_tables(result)
    common.write_json(result, options.output)
    return result


def print_tables(result: dict[str, Any]) -> None:
    """Time, then memory in MB (10^6 bytes)."""
    rows = result["rows"]
    shape = f"model={result['model']}, batch {result['batch_size']} x {result['seq_len']}, fp32"
    common.print_table(
        f"Optimizer step, {shape}",
        {
            "V": "vocab_size|,",
            "D": "depth",
            "parameters": "parameters|,",
            "ms": "ms_per_step|.1f",
            "min": "ms_fastest|.1f",
            "max": "ms_slowest|.1f",
            "tokens/s": "tokens_per_second|,.0f",
            "GFLOP/s": "gflops|.1f",
            "matmul": "matmul_gflops|.1f",
            "ratio": "ratio_to_matmul|.2f",
            "fastest": "fastest_gflops|.1f",
            "ratio to it": "ratio_to_fastest|.2f",
            "FLOPs/D=0": "flops_over_plain|.3f",
            "ms/D=0": "time_over_plain|.3f",
            "cost/share": "cost_over_share|.3f",
            "by rate": "cost_over_share_by_rate|.3f",
        },
        rows,
    )
    keys = ("rss_peak", "rss_imported", "state_bytes", "saved_bytes", "beyond_state", "transient")
    common.print_table(
        "Memory of the process, MB",
        {
            "V": "vocab_size|,",
            "D": "depth",
            "peak": "rss_peak|.0f",
            "imports": "rss_imported|.0f",
            "weights, gradients, AdamW": "state_bytes|.0f",
            "beyond these": "beyond_state|.0f",
            "activations": "saved_bytes|.0f",
            "rest": "transient|.0f",
            "peak/D=0": "peak_over_plain|.3f",
            "without modules' own": "peak_over_plain_without_own|.3f",
        },
        [{**row, **{key: row[key] / 1e6 for key in keys}} for row in rows],
    )


if __name__ == "__main__":
    main()

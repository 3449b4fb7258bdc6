"""Measures the time and the memory of an optimizer step.

    python -m benchmarks.train_step               by number of depths D and vocabulary V
    python -m benchmarks.train_step variants      by way of predicting several tokens
    python -m benchmarks.train_step precision     in fp32 and in bf16-mixed
    python -m benchmarks.train_step memory        with freed memory kept and given back
    python -m benchmarks.train_step profile       by kind of layer, forward and backward

A step is that of a run, without Lightning, callbacks and logging. Each configuration has processes
of its own, so that its peak memory is its own; configurations take turns. FLOPs count attention in
full, without a causal discount, as other libraries' figures do.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks import cli, harness, profiles, workloads
from benchmarks.harness import Row
from benchmarks.workloads import MODELS
from mtp_lightning.nn.ops import matmul_transposed

SIZE = 1024

# Name of a row -> mtp=, and overrides.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "sequential": ("sequential", []),
    "sequential, shared": ("sequential", ["mtp.share_layers=true"]),
    "parallel": ("parallel", []),
    "parallel, mlp": ("parallel", ["mtp.correction=mlp"]),
    "parallel, selector": ("parallel", ["mtp.correction=selector"]),
    "linear": ("linear", []),
    "linear, mlp": ("linear", ["mtp.correction=mlp"]),
    "linear, markov": ("linear", ["mtp.correction=markov"]),
    "linear, selector": ("linear", ["mtp.correction=selector"]),
    "linear, rank 4": ("linear", ["mtp.rank=4"]),
    "linear, stride 2": ("linear", ["mtp.stride=2"]),
    "sequential, token dropout": ("sequential", ["mtp.token_dropout=0.5"]),
    "joint": ("joint", []),
    "nextlat": ("nextlat", []),
    "eagle": ("eagle", []),
    "eagle, 64 tokens": ("eagle", ["mtp.draft_vocab=64"]),
    "dflash": ("dflash", []),
    "parameter_free": ("parameter_free", []),
    "top": ("top", []),
    "bag": ("bag", ["mtp.weights=none"]),
    "registers": ("registers", []),
    **{
        f"sequential, {word}": ("sequential", [f"objective={word}"])
        for word in (
            *("kl", "reverse_kl", "js", "tv", "nla", "lk", "feature"),
            *("anchor", "e2e_tv", "wtv", "eal"),
        )
    },
    "parallel, kl": ("parallel", ["objective=kl"]),
    "sequential, nextlat's objective": ("sequential", ["objective=nextlat"]),
}
# These variants have depth 1 only.
ONE_DEPTH = ("top", "bag", "registers")


def measure(task: Row) -> Iterator[Row]:
    """The costs of a configuration, then the time and memory of ``steps`` steps.

    With ``rates`` the process also measures two rates of matrix products of 1024^3 between the
    steps: of ``torch.matmul``, which is MKL's on an x86 CPU, and of the fastest kernel, oneDNN's
    where that is faster.
    """
    if not task.get("give_back"):
        workloads.prepare_process()
    built = workloads.build_step(task)
    model = built.model
    losses = [float(built.step()) for _ in range(workloads.WARMUP_STEPS)]
    yield {
        "loss": losses[-1],
        "parameters": model.config.num_params(),
        "gflop_per_step": built.flops_per_token * task["batch_size"] * task["seq_len"] / 1e9,
        "rss_imported": built.rss_imported,
        # Parameters, gradients and AdamW's two moments.
        "state_bytes": 4 * sum(p.numel() * p.element_size() for p in model.parameters()),
    }
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    products = {
        "matmul": lambda: torch.matmul(a, b),
        "fastest": lambda: matmul_transposed(a, b),
    }
    seconds, rates = [], []
    for _ in range(task["steps"]):
        seconds.append(harness.seconds_of(built.step))
        if task.get("rates"):
            times = harness.median_times(products, repeats=3)
            rates.append({f"{name}_gflops": 2 * SIZE**3 / s / 1e9 for name, s in times.items()})
    peak = harness.peak_rss()  # before the count below, which a run does not have
    with harness.saved_tensors(model.parameters()) as saved:
        hidden_bytes, loss = built.forward()
        loss.backward()
    yield {
        "ms_per_step": statistics.median(seconds) * 1e3,
        "rss_peak": peak,
        # The tensors that autograd keeps for backward, and the gradients of hidden states.
        "saved_peak": saved["peak"],
        "saved_bytes": saved["peak"] + hidden_bytes,
        **(harness.medians(rates) if rates else {}),
    }


def measure_rows(tasks: list[Row], repeats: int) -> Row:
    """The rows: medians over runs, compared with the row of D = 0; and the runs themselves."""
    sides = {task["name"]: partial(harness.measure_once, measure, task) for task in tasks}
    runs = list(harness.take_turns(sides, repeats).values())
    rows = [combine(task, done) for task, done in zip(tasks, runs, strict=True)]
    plain = {row["vocab_size"]: row for row in rows if row["depth"] == 0}
    for row in rows:
        if row["vocab_size"] in plain:
            compare(row, plain[row["vocab_size"]])
    return {"repeats": repeats, "rows": rows, "runs": runs}


def combine(task: Row, runs: list[Row]) -> Row:
    """The medians over a configuration's processes, and figures derived from them."""
    row = task | harness.medians(runs)
    tokens = task["batch_size"] * task["seq_len"]
    row["ms_slowest"] = max(run["ms_per_step"] for run in runs)
    row["ms_fastest"] = min(run["ms_per_step"] for run in runs)
    row["tokens_per_second"] = tokens / row["ms_per_step"] * 1e3
    row["gflops"] = row["gflop_per_step"] / row["ms_per_step"] * 1e3
    for name in ("matmul", "fastest") if "matmul_gflops" in row else ():
        # The median of the processes' ratios.
        row[f"ratio_to_{name}"] = statistics.median(
            run["gflop_per_step"] / run["ms_per_step"] * 1e3 / run[f"{name}_gflops"] for run in runs
        )
    row["beyond_imports"] = row["rss_peak"] - row["rss_imported"]
    row["beyond_state"] = row["beyond_imports"] - row["state_bytes"]
    row["transient"] = row["beyond_state"] - row["saved_bytes"]
    for key in [key for key in row if key.startswith(("rss_", "saved_", "beyond_"))]:
        row[f"{key.removesuffix('_bytes')}_mb"] = row[key] / 1e6
    row["state_mb"], row["transient_mb"] = row["state_bytes"] / 1e6, row["transient"] / 1e6
    return row


def compare(row: Row, plain: Row) -> None:
    """Add a row's time, FLOPs, parameters and memory relative to the plain trunk's."""
    share = row["gflop_per_step"] / plain["gflop_per_step"]
    row["flops_over_plain"], row["stack_share"] = share, 1 - 1 / share
    row["time_over_plain"] = row["ms_per_step"] / plain["ms_per_step"]
    row["cost_over_share"] = row["time_over_plain"] / share
    if "ratio_to_fastest" in row:
        # Corrected by the rate of products that each process saw: for a busy machine.
        row["cost_over_share_by_rate"] = plain["ratio_to_fastest"] / row["ratio_to_fastest"]
    row["parameters_added"] = row["parameters"] - plain["parameters"]
    row["saved_over_plain"] = row["saved_peak"] / plain["saved_peak"]
    own = row["state_bytes"] - plain["state_bytes"] + row["saved_bytes"] - plain["saved_bytes"]
    row["peak_over_plain"] = row["rss_peak"] / plain["rss_peak"]
    row["peak_over_plain_without_own"] = (row["rss_peak"] - own) / plain["rss_peak"]


@cli.command(quick={"steps": 4, "repeats": 1}, cpu_time=True)
def train_step(
    model: str = "micro",
    vocab_sizes: Sequence[int] = (4096, 32768),
    depths: Sequence[int] = (0, 1, 2, 4),
    batch_size: int = 8,
    seq_len: int = 256,
    steps: int = 12,
    repeats: int = 3,
) -> Row:
    """By number of depths D and vocabulary V."""
    task = {"model": model, "batch_size": batch_size, "seq_len": seq_len, "steps": steps}
    tasks = [
        {**task, "name": f"V={size} D={depth}", "vocab_size": size, "depth": depth, "rates": True}
        for size, depth in itertools.product(vocab_sizes, depths)
    ]
    result = measure_rows(tasks, repeats)
    cli.print_table(
        f"Optimizer step, {_title(task)}",
        "V: vocab_size ,; D: depth; parameters: parameters ,.0f; ms: ms_per_step .1f; "
        "min: ms_fastest .1f; max: ms_slowest .1f; tokens/s: tokens_per_second ,.0f; "
        "GFLOP/s: gflops .1f; matmul: matmul_gflops .1f; ratio: ratio_to_matmul .2f; "
        "fastest: fastest_gflops .1f; ratio to it: ratio_to_fastest .2f; "
        "FLOPs/D=0: flops_over_plain .3f; ms/D=0: time_over_plain .3f; "
        "cost/share: cost_over_share .3f; by rate: cost_over_share_by_rate .3f",
        result["rows"],
    )
    cli.print_table(
        "Memory of the process, MB (10^6 bytes)",
        "V: vocab_size ,; D: depth; peak: rss_peak_mb .0f; imports: rss_imported_mb .0f; "
        "weights, gradients, AdamW: state_mb .0f; beyond these: beyond_state_mb .0f; "
        "activations: saved_mb .0f; rest: transient_mb .0f; peak/D=0: peak_over_plain .3f; "
        "without modules' own: peak_over_plain_without_own .3f",
        result["rows"],
    )
    return result


@cli.command(quick={"steps": 3, "repeats": 1}, choices={"variants": list(VARIANTS)}, cpu_time=True)
def variants(
    model: str = "micro",
    depths: Sequence[int] = (1, 2, 4),
    variants: Sequence[str] = tuple(VARIANTS),
    vocab_size: int = 4096,
    batch_size: int = 8,
    seq_len: int = 256,
    steps: int = 10,
    repeats: int = 3,
) -> Row:
    """By way of predicting several tokens, each next to the plain trunk.

    ``activations`` is the most that autograd holds at once for backward. Independent heads
    (parallel, linear) are trained one after another, so theirs do not grow with D.

    Args:
        variants: the rows.
    """
    task = {"model": model, "batch_size": batch_size, "seq_len": seq_len, "steps": steps}
    task["vocab_size"] = vocab_size
    tasks = [{**task, "name": "none", "variant": "none", "mtp": "none", "depth": 0}]
    for name, depth in itertools.product(variants, depths):
        if depth == 1 or name not in ONE_DEPTH:
            mtp, overrides = VARIANTS[name]
            row = {"variant": name, "mtp": mtp, "overrides": overrides, "depth": depth}
            tasks.append({**task, "name": f"{name} D={depth}", **row})
    result = measure_rows(tasks, repeats)
    cli.print_table(
        f"Optimizer step, {_title(task)}, V={vocab_size}; memory in MB (10^6 bytes)",
        "mtp: variant; D: depth; parameters: parameters ,.0f; added: parameters_added ,.0f; "
        "ms: ms_per_step .1f; ms/none: time_over_plain .3f; FLOPs/none: flops_over_plain .3f; "
        "stack's FLOPs: stack_share .1%; tokens/s: tokens_per_second ,.0f; "
        "peak: beyond_imports_mb .0f; activations: saved_peak_mb .1f; "
        "activations/none: saved_over_plain .3f",
        result["rows"],
    )
    return result


@cli.command(quick={"steps": 2}, choices={"models": list(MODELS)}, cpu_time=True)
def precision(models: Sequence[str] = tuple(MODELS), steps: int = 15) -> Row:
    """In fp32 and in bf16-mixed, which is faster on CPUs with AVX512-BF16 or AMX (``lscpu``).

    Args:
        steps: turns, each a step in both precisions.
    """
    rows = []
    for name in models:
        task = {"model": name, **MODELS[name]}
        sides = {
            "fp32": partial(harness.Worker, workloads.training, task),
            "bf16": partial(harness.Worker, workloads.training, {**task, "autocast": True}),
        }
        found = harness.race(sides, steps, say=name)
        seconds = {side: [answer["seconds"] for answer in own] for side, own in found.items()}
        ms = {f"ms_{side}": 1e3 * statistics.median(own) for side, own in seconds.items()}
        tokens = task["batch_size"] * task["seq_len"]
        rows.append(
            {**task, **ms}
            | {"shape": f"{task['batch_size']} x {task['seq_len']}, V = {task['vocab_size']:,}"}
            | {"tokens_per_second": tokens / ms["ms_bf16"] * 1e3}
            | {"speedup": harness.ratio(seconds["fp32"], seconds["bf16"])}
        )
    cli.print_table(
        "Optimizer step in fp32 and in bf16-mixed",
        "model: model; batch: shape; D: depth; fp32, ms: ms_fp32 .1f; bf16, ms: ms_bf16 .1f; "
        "tokens/s: tokens_per_second ,.0f; times as fast: speedup .2f",
        rows,
    )
    return {"rows": rows}


@cli.command(quick={"steps": 4, "repeats": 1}, cpu_time=True)
def memory(model: str = "micro", depth: int = 2, steps: int = 12, repeats: int = 3) -> Row:
    """With freed memory kept, as the apps do (``keep_freed_memory``), and given back.

    Args:
        model: a model with its batch and vocabulary.
    """
    task = {"model": model, **MODELS[model], "depth": depth, "steps": steps}
    tasks = [{**task, "name": "kept"}, {**task, "name": "given back", "give_back": True}]
    result = measure_rows(tasks, repeats)
    for row in result["rows"]:
        row["speedup"] = result["rows"][1]["ms_per_step"] / row["ms_per_step"]
    cli.print_table(
        f"Optimizer step, {_title(task)}, by what happens to freed memory",
        "freed memory: name; ms: ms_per_step .1f; times as fast: speedup .2f; "
        "peak MB: rss_peak_mb .0f",
        result["rows"],
    )
    return result


def measure_profile(task: Row) -> Iterator[Row]:
    """The time of a model's steps by kind of layer."""
    workloads.prepare_process()
    built = workloads.build_step(task)
    for _ in range(workloads.WARMUP_STEPS):
        built.step()
    yield {"gflop_per_step": built.flops_per_token * task["batch_size"] * task["seq_len"] / 1e9}
    times = [harness.seconds_of(built.step) for _ in range(2 * task["steps"])]
    seconds = statistics.median(times)
    rows = profiles.profile_step(built, n_steps=task["steps"], seconds_per_step=seconds)
    yield {"ms_per_step": seconds * 1e3, "rows": rows}


@cli.command(quick={"steps": 2}, choices={"models": list(MODELS)}, cpu_time=True)
def profile(
    models: Sequence[str] = ("nano", "micro", "tiny", "pico"),
    steps: int = 10,
    threads: Sequence[int] = (1, 2),
) -> Row:
    """By kind of layer, forward and backward.

    Args:
        steps: profiled steps.
        threads: threads of a process; 1 under --cpu-time.
    """
    found = []
    for n, name in itertools.product([1] if harness.counts_cpu_time() else threads, models):
        task = {"name": f"{name}, threads: {n}", "model": name, **MODELS[name], "steps": steps}
        environment = {"OMP_NUM_THREADS": str(n)}
        measured = harness.measure_once(measure_profile, task, environment=environment)
        found.append({"model": name, "threads": n, **measured})
        cli.print_table(
            f"A step of model={name}, threads: {n}: {measured['ms_per_step']:.1f} ms"
            " (the profiler slows operators down: read shares)",
            "part: part; ms: ms .2f; share: share .1%; GFLOP: gflop .2f; "
            "products alone, ms: products_ms .2f; operators: operators .0f",
            measured["rows"],
        )
    return {"profiles": found}


def _title(task: Row) -> str:
    return f"model={task['model']}, batch {task['batch_size']} x {task['seq_len']}, fp32"


main = cli.program(train_step, variants, precision, memory, profile)

if __name__ == "__main__":
    main()

"""What every way of predicting several tokens costs on one trunk: time, memory, parameters, FLOPs.

Run ``python -m benchmarks.variants``. One step is what a run does, without Lightning, callbacks and
logging around it. Every row is measured in processes of its own (``--repeats`` of them, the rows
taking turns). ``activations`` is the most that autograd holds at once for backward passes:
independent heads (parallel, linear) are trained one after another, so theirs does not grow with D.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import common
from benchmarks.train_step import build_step

MODULE = "benchmarks.variants"
_WARMUP_STEPS = 2

# Name of a row -> its words on the command line.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "sequential": ("sequential", []),
    "sequential, shared": ("sequential", ["mtp.share_layers=true"]),
    "parallel": ("parallel", []),
    "parallel, mlp": ("parallel", ["mtp.correction=mlp"]),
    "linear": ("linear", []),
    "linear, mlp": ("linear", ["mtp.correction=mlp"]),
    "linear, markov": ("linear", ["mtp.correction=markov"]),
    "linear, rank 4": ("linear", ["mtp.rank=4"]),
    "linear, stride 2": ("linear", ["mtp.stride=2"]),
    "sequential, token dropout": ("sequential", ["mtp.token_dropout=0.5"]),
    "joint": ("joint", []),
    "nextlat": ("nextlat", []),
    "parameter_free": ("parameter_free", []),
    "top": ("top", []),
    "bag": ("bag", ["mtp.weights=none"]),
    "registers": ("registers", []),
    **{
        f"sequential, {word}": ("sequential", [f"objective={word}"])
        for word in ("kl", "reverse_kl", "js", "tv", "nla", "lk", "feature")
    },
    "parallel, kl": ("parallel", ["objective=kl"]),
    "sequential, nextlat's objective": ("sequential", ["objective=nextlat"]),
    "sequential, e2e_tv": ("sequential", ["objective=e2e_tv"]),
}
# Of these, depth 1 is all that there is.
ONE_DEPTH = ("top", "bag", "registers")


class _Saved:
    def __init__(self, tensor: Any, live: LiveSavedTensors) -> None:
        self.tensor, self.live = tensor, live
        self.address = tensor.untyped_storage().data_ptr()
        live.add(self.address, tensor.untyped_storage().nbytes())

    def __del__(self) -> None:
        self.live.drop(self.address)


class LiveSavedTensors:
    """Counts what autograd holds for backward passes at once, every storage once.

    Args:
        excluded: tensors that are there anyway, such as parameters.

    Attributes:
        peak: bytes.
    """

    def __init__(self, excluded: list[Any]) -> None:
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self._held: dict[int, tuple[int, int]] = {}  # address -> (holders, bytes)
        self._now = self.peak = 0

    def add(self, address: int, n_bytes: int) -> None:
        holders, _ = self._held.get(address, (0, 0))
        self._held[address] = (holders + 1, n_bytes)
        if not holders:
            self._now += n_bytes
            self.peak = max(self.peak, self._now)

    def drop(self, address: int) -> None:
        holders, n_bytes = self._held.pop(address)
        if holders > 1:
            self._held[address] = (holders - 1, n_bytes)
        else:
            self._now -= n_bytes

    def _pack(self, tensor: Any) -> Any:
        excluded = tensor.untyped_storage().data_ptr() in self._excluded
        return tensor if excluded else _Saved(tensor, self)

    @contextmanager
    def counting(self) -> Iterator[LiveSavedTensors]:
        """Count inside the block, which holds forward and backward pass."""
        import torch

        def unpack(saved: Any) -> Any:
            return saved.tensor if isinstance(saved, _Saved) else saved

        with torch.autograd.graph.saved_tensors_hooks(self._pack, unpack):
            yield self


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One row in this process; ``task`` is ``train_step``'s, with ``mtp`` and ``overrides``."""
    from mtp_lightning.runtime import keep_freed_memory

    keep_freed_memory()
    step, model, forward = build_step(task)
    seconds = []
    for index in range(_WARMUP_STEPS + task["steps"]):
        began = common.clock()
        step()
        if index >= _WARMUP_STEPS:
            seconds.append(common.clock() - began)
    peak = common.peak_rss()  # before the count below, which is not part of a run
    saved = LiveSavedTensors(list(model.parameters()))
    with saved.counting():
        _, loss = forward()
        loss.backward()
    config = model.config
    return {
        "ms_per_step": statistics.median(seconds) * 1e3,
        "rss_peak": peak - task["rss_imported"],
        "saved_peak": saved.peak,
        "parameters": config.num_params(),
        "parameters_active": config.num_active_params(),
        "flops_per_token": task["flops_per_token"],
    }


def _here(task: dict[str, Any]) -> dict[str, Any]:
    """:func:`measure`, after others in the same process."""
    return measure(task) | {"rss_peak": float("nan")}


def combine(task: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of one row's processes."""
    row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    row |= {key: task[key] for key in ("name", "depth")}
    tokens = task["batch_size"] * task["seq_len"]
    row["tokens_per_second"] = tokens / row["ms_per_step"] * 1e3
    return row


def compare(row: dict[str, Any], plain: dict[str, Any]) -> None:
    """Add what a row costs over the plain trunk."""
    row["time_over_plain"] = row["ms_per_step"] / plain["ms_per_step"]
    row["flops_over_plain"] = row["flops_per_token"] / plain["flops_per_token"]
    row["stack_share"] = 1 - plain["flops_per_token"] / row["flops_per_token"]
    row["parameters_added"] = row["parameters"] - plain["parameters"]
    row["saved_over_plain"] = row["saved_peak"] / plain["saved_peak"]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, writes the JSON and returns it."""
    parser = common.parser("Measures every way of predicting several tokens.", "variants")
    parser.add_argument("--model", default="micro", help="a size of conf/model")
    parser.add_argument("--depths", type=common.whole_numbers, default=[1, 2, 4])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, help="a process; default 10, with --quick 3")
    parser.add_argument("--repeats", type=int, help="processes; default 3, with --quick 1")
    parser.add_argument(
        "--together",
        action="store_true",
        help="all rows in this process, without its peak memory: where starting one takes minutes",
    )
    common.add_cpu_time(parser)
    options = parser.parse_args(arguments)
    if options.cpu_time:
        common.use_cpu_time()
    if options.child:
        result = measure(json.loads(options.child))
        common.answer_parent(result)
        return result
    steps = options.steps or (3 if options.quick else 10)
    repeats = options.repeats or (1 if options.quick else 3)

    rows = [("none", "none", 0, [])]
    rows += [(name, VARIANTS[name][0], depth, VARIANTS[name][1])
             for name in options.variants for depth in options.depths
             if depth == 1 or name not in ONE_DEPTH]  # fmt: skip
    tasks = [
        {
            "name": name,
            "mtp": mtp,
            "depth": depth,
            "overrides": overrides,
            "model": options.model,
            "vocab_size": options.vocab_size,
            "batch_size": options.batch_size,
            "seq_len": options.seq_len,
            "steps": steps,
        }
        for name, mtp, depth, overrides in rows
    ]
    runs: list[list[dict[str, Any]]] = [[] for _ in tasks]
    loads = []
    for repeat in range(repeats):
        for task, done in zip(tasks, runs, strict=True):
            common.progress(f"{repeat + 1}/{repeats}  {task['name']} D={task['depth']}")
            done.append(_here(task) if options.together else common.run_child(MODULE, task))
            loads.append(os.getloadavg()[0])
    measured = [combine(task, done) for task, done in zip(tasks, runs, strict=True)]
    for row in measured:
        compare(row, measured[0])
    result = {
        "benchmark": "variants",
        "model": options.model,
        "vocab_size": options.vocab_size,
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "steps": steps,
        "repeats": repeats,
        "rows": measured,
        "runs": runs,
        "load_average_highest": max(loads),
        "machine": common.machine(),
    }
    print_rows(result)
    common.write_json(result, options.output)
    return result


def print_rows(result: dict[str, Any]) -> None:
    """The table; memory in MB (10^6 bytes)."""
    shape = f"model={result['model']}, V={result['vocab_size']}"
    common.print_table(
        f"Optimizer step, {shape}, batch {result['batch_size']} x {result['seq_len']}",
        {
            "mtp": "name",
            "D": "depth",
            "parameters": "parameters|,.0f",
            "added": "parameters_added|,.0f",
            "ms": "ms_per_step|.1f",
            "ms/none": "time_over_plain|.3f",
            "FLOPs/none": "flops_over_plain|.3f",
            "stack's FLOPs": "stack_share|.1%",
            "tokens/s": "tokens_per_second|,.0f",
            "peak MB": "rss_peak|.0f",
            "activations MB": "saved_peak|.1f",
            "activations/none": "saved_over_plain|.3f",
        },
        [
            {**row, "rss_peak": row["rss_peak"] / 1e6, "saved_peak": row["saved_peak"] / 1e6}
            for row in result["rows"]
        ],
    )


if __name__ == "__main__":
    main()

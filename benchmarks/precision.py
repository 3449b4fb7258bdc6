"""What ``trainer.precision=bf16-mixed`` gains on a CPU: whole steps in both, in turn.

Run ``python -m benchmarks.precision --cpu-time``. Products are bf16's and everything else is
fp32's; it takes a CPU with AVX512-BF16 or AMX (``lscpu``) to gain by it. What a run then learns is
compared by ``python train.py -m trainer.precision=32-true,bf16-mixed seed=0,1,2``.
"""

from __future__ import annotations

from typing import Any

from benchmarks import common, train_step

MODELS: dict[str, dict[str, Any]] = {
    **train_step.PROFILED,
    "deepseek_nano": {"vocab_size": 1024, "depth": 1, "batch_size": 4, "seq_len": 256},
    "deepseek_micro": {"vocab_size": 4096, "depth": 1, "batch_size": 4, "seq_len": 256},
}


def measure(name: str, steps: int) -> dict[str, Any]:
    """Median milliseconds of an optimizer step in both precisions, of ``steps`` in turn.

    Args:
        name: of ``MODELS``.
        steps: of each.
    """
    import torch

    task = {"model": name, **MODELS[name]}
    fp32, bf16 = (train_step.build_step(dict(task))[0] for _ in range(2))
    # As Lightning's plugin has it, around forward and backward.
    ways = {"fp32": fp32, "bf16": torch.autocast("cpu", torch.bfloat16)(bf16)}
    seconds = common.median_times(ways, repeats=steps, warmup=2)
    tokens = task["batch_size"] * task["seq_len"]
    return {
        "model": name,
        "shape": f"{task['batch_size']} x {task['seq_len']}, V = {task['vocab_size']:,}",
        "depth": task["depth"],
        "ms_fp32": seconds["fp32"] * 1e3,
        "ms_bf16": seconds["bf16"] * 1e3,
        "tokens_per_second": tokens / seconds["bf16"],
        "speedup": seconds["fp32"] / seconds["bf16"],
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, writes the JSON and returns it."""
    parser = common.parser("Measures an optimizer step in fp32 and in bf16-mixed.", "precision")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, help="of each; default 15, with --quick 2")
    common.add_cpu_time(parser)
    options = parser.parse_args(arguments)
    if options.cpu_time:
        common.use_cpu_time()
    steps = options.steps or (2 if options.quick else 15)
    rows = []
    for name in options.models:
        common.progress(name)
        rows.append(measure(name, steps))
    result = {"benchmark": "precision", "rows": rows, "machine": common.machine()}
    common.print_table(
        "Optimizer step in fp32 and in bf16-mixed",
        {
            "model": "model",
            "batch": "shape",
            "D": "depth",
            "fp32, ms": "ms_fp32|.1f",
            "bf16, ms": "ms_bf16|.1f",
            "tokens/s": "tokens_per_second|,.0f",
            "times as fast": "speedup|.2f",
        },
        rows,
    )
    common.write_json(result, options.output)
    return result


if __name__ == "__main__":
    from mtp_lightning.runtime import keep_freed_memory

    keep_freed_memory()  # as the apps do
    main()

"""What routing costs: a mixture of experts against a dense layer of the same active size.

Run ``python -m benchmarks.moe``. Forward and backward passes of the feed-forward layers of the
``deepseek_*`` presets on one micro-batch; inputs are new every time, so that experts get
other numbers of tokens, as in training. The dense layer is as wide as the shared and the chosen
experts together. The two take turns, with the mixture that has no C++ (``mtp_lightning/cpu``),
and ratios are those of the medians.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from benchmarks import common

# Windows and tokens a window of the micro-batch.
SIZES = {"nano": (16, 256), "micro": (16, 256), "tiny": (8, 256)}
LIMIT = 1.5


def measure(size: str, *, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    import torch

    from mtp_lightning.cpu import library as native
    from mtp_lightning.experiment.instantiate import instantiate
    from mtp_lightning.nn.feed_forward import FeedForward
    from mtp_lightning.nn.init import initialise
    from mtp_lightning.nn.moe import MoE

    config = instantiate(common.compose_config([f"model=deepseek_{size}"]).model, vocab_size=256)
    experts = config.feed_forward
    batch, seq_len = SIZES[size]
    active = (experts.n_shared + experts.top_k) * experts.d_expert
    layers = {"moe": MoE(config.d_model, experts), "dense": FeedForward(config.d_model, active)}
    layers["plain"] = layers["moe"]
    for layer in layers.values():
        initialise(layer, std=config.init_std, seed=0)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, seq_len, config.d_model)
    pool = [torch.randn(shape, generator=generator) for _ in range(repeats + 3)]
    grad = torch.randn(shape, generator=generator)
    turns = dict.fromkeys(layers, 0)

    def step(name: str) -> None:
        x = pool[turns[name] % len(pool)].requires_grad_()
        turns[name] += 1
        library = None if name == "plain" else native.library
        with mock.patch.object(native, "library", library):
            layers[name](x).backward(grad)
        x.grad = None
        for parameter in layers[name].parameters():
            parameter.grad = None

    steps = {name: (lambda name=name: step(name)) for name in layers}
    seconds = common.median_times(steps, repeats=repeats, warmup=3)
    n_tokens = batch * seq_len
    return {
        "model": f"deepseek_{size}",
        "experts": f"{experts.n_shared} + {experts.top_k} of {experts.n_routed}",
        "d_expert": experts.d_expert,
        "dense_d_ff": active,
        "tokens": n_tokens,
        "moe_us_per_token": 1e6 * seconds["moe"] / n_tokens,
        "dense_us_per_token": 1e6 * seconds["dense"] / n_tokens,
        "ratio": seconds["moe"] / seconds["dense"],
        "times_as_fast": seconds["plain"] / seconds["moe"],
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, writes the JSON and returns it."""
    parser = common.parser("A mixture of experts against a dense layer.", "moe")
    parser.add_argument("--sizes", default=",".join(SIZES), help="comma-separated scale words")
    parser.add_argument("--threads", type=int, default=None, help="threads; default all cores")
    common.add_cpu_time(parser)
    options = parser.parse_args(arguments)
    import torch

    from mtp_lightning.runtime import keep_freed_memory

    keep_freed_memory()
    if options.cpu_time:
        common.use_cpu_time()
    elif options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for size in options.sizes.split(","):
        common.progress(f"deepseek_{size}")
        rows.append(measure(size, repeats=5 if options.quick else 25))
    columns = {
        "model": "model",
        "experts": "experts",
        "tokens": "tokens|,",
        "MoE us/token": "moe_us_per_token|.2f",
        "dense us/token": "dense_us_per_token|.2f",
        f"ratio (limit {LIMIT})": "ratio|.2f",
        "times as fast as without C++": "times_as_fast|.2f",
    }
    common.print_table("Forward and backward of a feed-forward layer", columns, rows)
    result = {"machine": common.machine(), "limit": LIMIT, "rows": rows}
    common.write_json(result, options.output)
    return result


if __name__ == "__main__":
    main()

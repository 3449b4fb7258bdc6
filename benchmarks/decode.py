"""Decoding speed: plain against speculative, what the difference could be at most, and
transformers with the same weights.

    python -m benchmarks.decode                          # trains two small models on bytes first
    python -m benchmarks.decode --checkpoint FILE        # a checkpoint of train.py, or a run folder
    python -m benchmarks.decode --checkpoint FILE --trees 2,1 3,2    # trees of drafts

Every comparison is of the same greedy tokens, which is checked. ``possible`` is the speed-up that
tokens_per_step and the measured cost of verify and draft passes allow; ``share`` is how much of it
is reached. A batch decodes several prompts a place, as a file of prompts is decoded: the place of
one that has ended is taken by the next. Its prompts are of uneven lengths, as a file's are, unless
``--even`` says otherwise: rows that end and begin together share more. ``against_single`` is its
tokens/s over those of as many prompts as it has places, one by one. ``memory`` is the rate at which
passes read weights beside a plain read's. Times are medians, ratios medians of pairs. transformers
(extra ``hf``) decodes one prompt at a time, as its ``use_mtp=True`` does; a model of SmolLM2-135M's
shape ends the run.
"""

from __future__ import annotations

import sysconfig
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import common
from benchmarks.decode_limits import against_transformers, memory_rate, of_wide_model
from data_modules.windows import WindowBatch
from mtp_lightning.decoding.measure import PassCosts, pass_costs, race
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.sequence import rates
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.objective.balance.base import NoBalance
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"speculative": False},
    "speculative": {},
    "auto": {"draft_depth": "auto"},
}
# Of one prompt at a time.
COMPILED: dict[str, dict[str, Any]] = {
    f"compiled_{name}": {**way, "compile": True} for name, way in WAYS.items()
}


def train(model: MTPModel, tokens: torch.Tensor, *, seconds: float, seq_len: int = 128) -> float:
    """Train for some seconds with lambda 0.3. Returns the last step's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    width, batch_size, loss = seq_len + model.depth + 1, 16, torch.tensor(0.0)
    step = OptimizerStep(
        model,
        schedule=Piecewise(model.depth, 0.3),
        balance=NoBalance(model.depth),
        clip_norm=1.0,
    )
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, elapsed / seconds * 20) * (1 - 0.9 * elapsed / seconds)
        starts = torch.randint(0, len(tokens) - width, (batch_size, 1), generator=generator)
        batch = WindowBatch(tokens[starts + torch.arange(width)], model.depth)
        loss = step(batch, Progress(step=0, max_steps=1), optimizer).loss
    return float(loss)


def byte_model(*, deepseek: bool) -> MTPModel:
    """A trunk of 6 blocks with D = 2: dense, 256 wide, or DeepSeek-V3's, 128 wide."""
    if deepseek:
        trunk = TrunkConfig(
            vocab_size=257, d_model=128, n_layers=6, n_heads=4, n_kv_heads=4, d_ff=384,
            attention=LatentAttentionConfig(
                q_rank=None, kv_rank=32, d_nope=32, d_rope=16, d_value=32
            ),
            feed_forward=ExpertsConfig(
                n_routed=16, n_shared=1, top_k=2, d_expert=96, first_k_dense=1, n_groups=1,
                top_groups=1, scaling=1.0,
            ),
        )  # fmt: skip
    else:
        trunk = TrunkConfig(
            vocab_size=257, d_model=256, n_layers=6, n_heads=4, n_kv_heads=4, d_ff=704
        )
    model = MTPModel(ModelConfig(trunk=trunk, mtp=SequentialConfig(depth=2)))
    model.initialise(0)
    return model.eval()


# Prompts of a batch for each of its places.
_PER_PLACE = 8


def measure_trees(
    model: MTPModel,
    prompts: list[list[int]],
    trees: list[list[int]],
    *,
    batch: int,
    new_tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """Trees of drafts against the chain, several prompts a place."""
    chain = DecodingOptions(max_new_tokens=new_tokens, batch_size=batch)
    ways = {"plain": chain.plain(), "chain": chain}
    ways |= {str(tree): replace(chain, tree=tree) for tree in trees}
    prompts = prompts[: batch * _PER_PLACE]
    run = race(model, prompts, ways, repeats=repeats, clock=common.clock)
    texts = {name: [g.token_ids for g in outputs] for name, outputs in run.outputs.items()}
    return {
        "batch": batch,
        "tokens_per_second": {
            name: len(prompts) * new_tokens / median(s) for name, s in run.seconds.items()
        },
        "tokens_per_step": {
            name: rates(outputs)["tokens_per_step"] for name, outputs in run.outputs.items()
        },
        "over_chain": {name: run.speedup(name, "chain") for name in ways},
        "greedy_equal": all(found == texts["plain"] for found in texts.values()),
    }


def measure(
    model: MTPModel,
    prompts: list[list[int]],
    *,
    batch: int,
    new_tokens: int,
    repeats: int,
    compile: bool,
    even: bool = False,
) -> dict[str, Any]:
    """Plain, speculative and adaptive decoding of a batch, and of single prompts one by one."""
    prompts = prompts[: batch * _PER_PLACE] if batch > 1 else prompts[:1]
    if batch > 1 and not even:
        prompts = [prompt[: _uneven(len(prompt), i)] for i, prompt in enumerate(prompts)]
    options = DecodingOptions(max_new_tokens=new_tokens, batch_size=batch)
    named = WAYS | (COMPILED if batch == 1 and compile else {})
    ways = {name: replace(options, **way) for name, way in named.items()}
    began = time.perf_counter()
    short = {name: replace(way, max_new_tokens=min(new_tokens, 16)) for name, way in ways.items()}
    race(model, prompts, short)  # builds what is compiled
    built = time.perf_counter() - began
    run = race(model, prompts, ways, repeats=repeats, clock=common.clock)
    texts = {name: [g.token_ids for g in outputs] for name, outputs in run.outputs.items()}
    loop = rates(run.outputs["speculative"])
    tokens_per_step = loop.pop("tokens_per_step")
    half = prompts[0] + texts["plain"][0][: new_tokens // 2]

    def compared(speculative: str, auto: str, plain: str, costs: PassCosts) -> dict[str, Any]:
        speedup, possible = run.speedup(speculative, plain), costs.speedup(tokens_per_step)
        return {
            "speedup": speedup,
            "auto_speedup": run.speedup(auto, plain),
            "possible": possible,
            "share": speedup / possible,
            "verify_us": [1e6 * s for s in costs.verify],
            "draft_us": [1e6 * s for s in costs.draft],
        }

    costs = pass_costs(model, half, batch=batch, clock=common.clock)
    result = {
        "batch": batch,
        "tokens_per_second": {
            name: len(prompts) * new_tokens / median(s) for name, s in run.seconds.items()
        },
        "tokens_per_step": tokens_per_step,
        "acceptance": list(loop.values()),
        **compared("speculative", "auto", "plain", costs),
        "greedy_equal": all(found == texts["plain"] for found in texts.values()),
    }
    if batch == 1 and compile:
        costs = pass_costs(model, half, compile=True, clock=common.clock)
        result["compiled"] = compared(
            "compiled_speculative", "compiled_auto", "compiled_plain", costs
        )
        result["compiled_over_eager"] = run.speedup("compiled_speculative", "speculative")
        result["seconds_to_compile"] = built
    if batch > 1:
        one = {name: replace(way, batch_size=1) for name, way in ways.items()}
        alone = race(model, prompts[:batch], one, clock=common.clock)
        result["against_single"] = {
            name: _PER_PLACE * sum(alone.seconds[name]) / median(run.seconds[name]) for name in WAYS
        }
    return result


def _uneven(length: int, i: int) -> int:
    """From more than half of a length to all of it, scattered."""
    return length - 7 * i % max(length // 2, 1)


def show(name: str, result: dict[str, Any]) -> None:
    """A few lines a result."""
    print(name)
    for key, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {_short(v)}" for k, v in value.items())
        else:
            value = _short(value)
        print(f"  {key:<32} {value}")


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_short(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def built_in(seconds: float) -> tuple[dict[str, MTPModel], torch.Tensor]:
    """Models of bytes, trained and not, and text that they have not seen."""
    text = library_bytes()
    models = {}
    for name in ("dense", "deepseek"):
        models[name] = byte_model(deepseek=name == "deepseek").train()
        loss = train(models[name], text[:-100_000], seconds=seconds)
        models[name].eval()
        print(f"trained {name} for {seconds:.0f} s on bytes, loss with depths {loss:.2f}")
    # An untrained model's drafts are hardly ever right.
    models["deepseek, untrained"] = byte_model(deepseek=True)
    return models, text[-100_000:]


def library_bytes(limit: int = 2_000_000) -> torch.Tensor:
    """The standard library's sources as byte ids."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes() + b"\n"
        if len(text) > limit:
            break
    return torch.tensor(list(text[:limit]))


def prompts_of(text: torch.Tensor, n: int, length: int) -> list[list[int]]:
    """``n`` pieces of a text."""
    gap = (len(text) - length) // n
    return [text[start : start + length].tolist() for start in range(0, n * gap, gap)]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__.splitlines()[0], "decode")
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", default=[], help="run folders or checkpoint files"
    )
    parser.add_argument("--train-seconds", type=float, default=60.0)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--even", action="store_true", help="a batch's prompts are of one length")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--trees", nargs="+", default=[], help="such as 3,2,1: trees against the chain, alone"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-wide", dest="wide", action="store_false", help="not SmolLM2's shape")
    common.add_cpu_time(parser)
    args = parser.parse_args(arguments)
    if args.cpu_time:
        common.use_cpu_time()
    options = {"new_tokens": args.new_tokens, "repeats": 1 if args.quick else args.repeats}
    sizes = {"n": _PER_PLACE * max(args.batches), "length": args.prompt_tokens}
    cases: dict[str, tuple[MTPModel, list[list[int]]]] = {}
    for path in args.checkpoint:
        from mtp_lightning.experiment.evaluating import validation_data
        from mtp_lightning.opening import open_model

        run = open_model(path)
        held_out = validation_data(run).held_out_prompts(**sizes)
        cases[str(path)] = run.model, [prompt.tolist() for prompt in held_out]
    if not cases:
        models, text = built_in(args.train_seconds)
        cases = {name: (model, prompts_of(text, **sizes)) for name, model in models.items()}
    results: dict[str, Any] = {}
    for name, (model, prompts) in cases.items():
        if args.trees:
            trees = [[int(width) for width in tree.split(",")] for tree in args.trees]
            for batch in args.batches:
                key = f"{name}, trees, batch {batch}"
                results[key] = measure_trees(model, prompts, trees, batch=batch, **options)
                show(key, results[key])
            continue
        for batch in args.batches:
            key = f"{name}, batch {batch}"
            results[key] = measure(
                model, prompts, batch=batch, compile=args.compile, even=args.even, **options
            )
            show(key, results[key])
        key = f"{name}, memory"
        results[key] = memory_rate(model, prompts[0], repeats=4 * options["repeats"])
        show(key, results[key])
        if find_spec("transformers"):
            key = f"{name}, transformers"
            ways = {**WAYS, **(COMPILED if args.compile else {})}
            results[key] = against_transformers(model, prompts[0], ways, **options)
            show(key, results[key])
    if args.wide and find_spec("transformers"):
        found = of_wide_model(
            list(range(1, args.prompt_tokens + 1)),
            new_tokens=min(args.new_tokens, 48),
            repeats=options["repeats"],
        )
        for precision, result in found.items():
            key = f"SmolLM2's shape, {precision}"
            results[key] = result
            show(key, result)
    result = {"machine": common.machine(), "results": results}
    common.write_json(result, args.output)
    return result


if __name__ == "__main__":
    main()

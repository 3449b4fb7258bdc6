"""How fast decoding is: plain against speculative, and both against what is possible.

    python -m benchmarks.decode                          # trains two small models on bytes first
    python -m benchmarks.decode --checkpoint FILE        # a checkpoint of train.py, or a run folder
    python -m benchmarks.decode --checkpoint FILE --trees 2,1 3,2    # trees of drafts

Every comparison is of the same greedy tokens, which is checked. ``possible`` is the speed-up that
tokens_per_step and the measured cost of verify and draft passes allow; ``share`` is how much of it
is reached. A batch decodes several prompts for each of its slots, as a file of prompts is decoded:
the slot of a finished one goes to the next. Its prompts have uneven lengths, as a file's have,
unless ``--even`` is given: sequences that begin and end together share more passes.
``against_single`` is the batch's tokens/s over those of as many prompts as it has slots, one by
one. ``memory`` is the rate at which passes read weights, next to a plain read's. Times are medians,
ratios medians of pairs. transformers (extra ``hf``) decodes one prompt at a time, as its
``use_mtp=True`` does; a model of SmolLM2-135M's shape ends the run.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import cli, harness
from benchmarks.decode_limits import against_transformers, memory_rate, of_wide_model
from benchmarks.harness import Row
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


# Prompts of a batch for each of its slots.
_PER_SLOT = 8


def measure_trees(
    model: MTPModel,
    prompts: list[list[int]],
    trees: list[list[int]],
    *,
    batch: int,
    new_tokens: int,
    repeats: int,
) -> Row:
    """Trees of drafts against the chain, several prompts a slot."""
    chain = DecodingOptions(max_new_tokens=new_tokens, batch_size=batch)
    ways = {"plain": chain.plain(), "chain": chain}
    ways |= {str(tree): replace(chain, tree=tree) for tree in trees}
    prompts = prompts[: batch * _PER_SLOT]
    run = race(model, prompts, ways, repeats=repeats, clock=harness.clock)
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
) -> Row:
    """Plain, speculative and adaptive decoding of a batch, and of single prompts one by one."""
    prompts = prompts[: batch * _PER_SLOT] if batch > 1 else prompts[:1]
    if batch > 1 and not even:
        prompts = [prompt[: _uneven(len(prompt), i)] for i, prompt in enumerate(prompts)]
    options = DecodingOptions(max_new_tokens=new_tokens, batch_size=batch)
    named = WAYS | (COMPILED if batch == 1 and compile else {})
    ways = {name: replace(options, **way) for name, way in named.items()}
    began = time.perf_counter()
    short = {name: replace(way, max_new_tokens=min(new_tokens, 16)) for name, way in ways.items()}
    race(model, prompts, short)  # builds what is compiled
    built = time.perf_counter() - began
    run = race(model, prompts, ways, repeats=repeats, clock=harness.clock)
    texts = {name: [g.token_ids for g in outputs] for name, outputs in run.outputs.items()}
    loop = rates(run.outputs["speculative"])
    tokens_per_step = loop.pop("tokens_per_step")
    half = prompts[0] + texts["plain"][0][: new_tokens // 2]

    def compared(speculative: str, auto: str, plain: str, costs: PassCosts) -> Row:
        speedup, possible = run.speedup(speculative, plain), costs.speedup(tokens_per_step)
        return {
            "speedup": speedup,
            "auto_speedup": run.speedup(auto, plain),
            "possible": possible,
            "share": speedup / possible,
            "verify_us": [1e6 * s for s in costs.verify],
            "draft_us": [1e6 * s for s in costs.draft],
        }

    costs = pass_costs(model, half, batch=batch, clock=harness.clock)
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
        costs = pass_costs(model, half, compile=True, clock=harness.clock)
        result["compiled"] = compared(
            "compiled_speculative", "compiled_auto", "compiled_plain", costs
        )
        result["compiled_over_eager"] = run.speedup("compiled_speculative", "speculative")
        result["seconds_to_compile"] = built
    if batch > 1:
        one = {name: replace(way, batch_size=1) for name, way in ways.items()}
        alone = race(model, prompts[:batch], one, clock=harness.clock)
        result["against_single"] = {
            name: _PER_SLOT * sum(alone.seconds[name]) / median(run.seconds[name]) for name in WAYS
        }
    return result


def _uneven(length: int, i: int) -> int:
    """From more than half of a length to all of it, scattered."""
    return length - 7 * i % max(length // 2, 1)


def show(name: str, result: Row) -> None:
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


@cli.command(quick={"repeats": 1}, cpu_time=True)
def decode(
    checkpoint: Sequence[Path] = (),
    train_seconds: float = 60.0,
    new_tokens: int = 256,
    prompt_tokens: int = 32,
    batches: Sequence[int] = (1, 8),
    even: bool = False,
    repeats: int = 5,
    trees: Sequence[str] = (),
    compile: bool = True,
    wide: bool = True,
) -> Row:
    """Plain and speculative decoding.

    Args:
        checkpoint: run folders or checkpoint files; without any, small models are trained.
        train_seconds: of each of these.
        new_tokens: of a prompt.
        prompt_tokens: of a prompt.
        batches: sequences at once.
        even: prompts of a batch have one length.
        trees: such as 3,2,1: trees of drafts against the chain, alone.
        compile: leave out compiled passes.
        wide: leave out SmolLM2's shape.
    """
    results: Row = {}

    def note(name: str, result: Row) -> None:
        results[name] = result
        show(name, result)

    own: Row = {"new_tokens": new_tokens, "repeats": repeats}
    sizes: Row = {"n": _PER_SLOT * max(batches), "length": prompt_tokens}
    for name, (model, prompts) in cases(checkpoint, train_seconds, **sizes).items():
        for batch in batches:
            if trees:
                widths = [cli.whole_numbers(tree) for tree in trees]
                found = measure_trees(model, prompts, widths, batch=batch, **own)
                note(f"{name}, trees, batch {batch}", found)
                continue
            found = measure(model, prompts, batch=batch, compile=compile, even=even, **own)
            note(f"{name}, batch {batch}", found)
        if not trees:
            note(f"{name}, memory", memory_rate(model, prompts[0], repeats=4 * repeats))
        if not trees and find_spec("transformers"):
            ways = {**WAYS, **(COMPILED if compile else {})}
            found = against_transformers(model, prompts[0], ways, **own)
            note(f"{name}, transformers", found)
    if wide and find_spec("transformers"):
        prompt = list(range(1, prompt_tokens + 1))
        shaped = of_wide_model(prompt, new_tokens=min(new_tokens, 48), repeats=repeats)
        for precision, found in shaped.items():
            note(f"SmolLM2's shape, {precision}", found)
    return {"results": results}


def cases(
    checkpoints: Sequence[Path], train_seconds: float, *, n: int, length: int
) -> dict[str, tuple[MTPModel, list[list[int]]]]:
    """Models with ``n`` held-out prompts of ``length`` tokens."""
    if not checkpoints:
        models, text = built_in(train_seconds)
        return {name: (model, prompts_of(text, n, length)) for name, model in models.items()}
    from mtp_lightning.experiment.evaluating import validation_data
    from mtp_lightning.opening import open_model

    found = {}
    for path in checkpoints:
        run = open_model(path)
        held_out = validation_data(run).held_out_prompts(n=n, length=length)
        found[str(path)] = run.model, [prompt.tolist() for prompt in held_out]
    return found


main = cli.program(decode)


if __name__ == "__main__":
    main()

"""Measures plain and speculative decoding, and the speed-up that is possible.

    python -m benchmarks.decode                        # trains small models on bytes first
    python -m benchmarks.decode --checkpoint RUN       # a checkpoint of train.py, or a run's folder
    python -m benchmarks.decode --checkpoint RUN --trees 2,1 3,2    # trees of drafts
    python -m benchmarks.decode --checkpoint RUN --batches 64 --temperature 1    # verify=

All ways decode the same greedy tokens, which is checked, and take turns; times are medians, ratios
medians of pairs. ``possible`` is the speed-up that tokens_per_step and the measured cost of verify
and draft passes allow; ``share`` is the reached part of it. A batch has several prompts for each
slot, as a file of prompts has: the slot of a finished sequence goes to the next prompt.
``against_single`` is the batch's tokens/s over those of prompts decoded one by one. ``memory`` is
the rate at which passes read weights, next to a plain read's. transformers (extra ``hf``) decodes
one prompt at a time, as its ``use_mtp=True`` does. A model of SmolLM2-135M's shape comes last.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cli, harness
from benchmarks.harness import Row
from data_modules.tokenizers.byte import ByteTokenizer
from mtp_lightning.cpu.packed import packed_of
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.measure import PassCosts, Race, intervals, pass_costs, race
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.precision import use_precision
from mtp_lightning.decoding.sequence import rates
from mtp_lightning.decoding.trunk_session import TrunkSession
from mtp_lightning.decoding.verification import RULES
from mtp_lightning.experiment.evaluating import validation_data
from mtp_lightning.interop.config_json import model_type
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.opening import open_model

WAYS: dict[str, Row] = {
    "plain": {"speculative": False},
    "speculative": {},
    "auto": {"draft_depth": "auto"},
}
# Of one prompt at a time.
COMPILED: dict[str, Row] = {f"compiled_{n}": {**way, "compile": True} for n, way in WAYS.items()}
# Prompts of a batch for each of its slots, and of a sampled text's measure.
_PER_SLOT, _SAMPLED = 8, 256

_BYTES = ["tokenizer=byte", "mtp.depth=2", "data.seq_len=128", "data.batch_size=16"]
_BYTES += ["data.eval_bytes=30000", "~callbacks.speculative_eval", "trainer.accelerator=cpu"]
# Name -> overrides: models of 6 blocks that are trained where no checkpoint is given.
TRAINED: dict[str, list[str]] = {
    "dense": ["model=nano", "model.d_model=256", "model.n_layers=6", "model.n_heads=4"]
    + ["model.n_kv_heads=4", "model.d_ff=704"],
    "deepseek": ["model=deepseek_nano", "model.d_model=128", "model.n_layers=6"]
    + ["model.n_heads=4", "model.d_ff=384", "model.attention.kv_rank=32"]
    + ["model.feed_forward.d_expert=96"],
}


def train_models(steps: int, folder: Path) -> list[Path]:
    """Train small models on the standard library's bytes; returns the runs' folders.

    The last one is a DeepSeek model of a single step, whose drafts are hardly ever right.
    """
    runs = []
    for name, n in (("dense", steps), ("deepseek", steps), ("deepseek", 1)):
        runs.append(folder / (name if n > 1 else f"{name}, untrained"))
        harness.progress(f"training {runs[-1].name}")
        length = [f"trainer.max_steps={n}", f"trainer.val_check_interval={n}"]
        words = ["train.py", *_BYTES, *TRAINED[name], *length, f"run_dir={runs[-1]}"]
        harness.usage_of([sys.executable, *words])
    return runs


def compared(run: Race, texts: int, new_tokens: int) -> Row:
    ids = [[one.token_ids for one in outputs] for outputs in run.outputs.values()]
    speeds = {name: texts * new_tokens / median(s) for name, s in run.seconds.items()}
    return {"tokens_per_second": speeds, "greedy_equal": all(own == ids[0] for own in ids)}


def measure_trees(
    model: MTPModel,
    prompts: list[list[int]],
    trees: Sequence[list[int]],
    *,
    batch: int,
    new_tokens: int,
    repeats: int,
) -> Row:
    """Trees of drafts next to the chain, several prompts a slot."""
    chain = DecodingOptions(max_new_tokens=new_tokens, batch_size=batch)
    ways = {"plain": chain.plain(), "chain": chain}
    ways |= {str(tree): replace(chain, tree=tree) for tree in trees}
    prompts = prompts[: batch * _PER_SLOT]
    run = race(model, prompts, ways, repeats=repeats, clock=harness.clock)
    steps = {name: rates(outputs)["tokens_per_step"] for name, outputs in run.outputs.items()}
    return {
        "batch": batch,
        **compared(run, len(prompts), new_tokens),
        "tokens_per_step": steps,
        "over_chain": {name: run.speedup(name, "chain") for name in ways},
    }


def measure_rules(
    model: MTPModel,
    prompts: list[list[int]],
    *,
    temperature: float,
    batch: int,
    new_tokens: int,
    repeats: int,
) -> Row:
    """Sampled text by every rule of ``verify=``, next to sampling without drafts."""
    plain = DecodingOptions(
        max_new_tokens=new_tokens, batch_size=batch, temperature=temperature, speculative=False
    )
    ways = {rule: replace(plain, speculative=True, verify=rule) for rule in RULES}
    run = race(model, prompts, {"plain": plain, **ways}, repeats=repeats, clock=harness.clock)
    found = {rule: {**rates(texts), **intervals(texts)} for rule, texts in run.outputs.items()}
    names = ("tokens_per_step", "tokens_per_step_low", "tokens_per_step_high")
    return {
        "batch": batch,
        "prompts": len(prompts),
        **{name: {rule: found[rule][name] for rule in ways} for name in names},
        "over_plain": {rule: run.speedup(rule) for rule in ways},
        "over_token": {rule: run.speedup(rule, "token") for rule in ways},
    }


def measure(
    model: MTPModel,
    prompts: list[list[int]],
    *,
    batch: int,
    new_tokens: int,
    repeats: int,
    compile: bool,
    even: bool,
) -> Row:
    """Plain, speculative and adaptive decoding of a batch, and of single prompts one by one."""
    prompts = prompts[: batch * _PER_SLOT] if batch > 1 else prompts[:1]
    if batch > 1 and not even:  # from more than half of the length to all of it, scattered
        prompts = [p[: len(p) - 7 * i % max(len(p) // 2, 1)] for i, p in enumerate(prompts)]
    compile = compile and batch == 1
    options = DecodingOptions(max_new_tokens=new_tokens, batch_size=batch)
    ways = {n: replace(options, **way) for n, way in (WAYS | (COMPILED if compile else {})).items()}
    began = time.perf_counter()
    short = {name: replace(way, max_new_tokens=min(new_tokens, 16)) for name, way in ways.items()}
    race(model, prompts, short)  # builds what is built once
    built = time.perf_counter() - began
    run = race(model, prompts, ways, repeats=repeats, clock=harness.clock)
    loop = rates(run.outputs["speculative"])
    tokens_per_step = loop.pop("tokens_per_step")
    half = prompts[0] + run.outputs["plain"][0].token_ids[: new_tokens // 2]

    def speedups(costs: PassCosts, prefix: str = "") -> Row:
        plain, possible = f"{prefix}plain", costs.speedup(tokens_per_step)
        speedup = run.speedup(f"{prefix}speculative", plain)
        return {
            "speedup": speedup,
            "auto_speedup": run.speedup(f"{prefix}auto", plain),
            "possible": possible,
            "share": speedup / possible,
            "verify_us": [1e6 * s for s in costs.verify],
            "draft_us": [1e6 * s for s in costs.draft],
        }

    result = {
        "batch": batch,
        **compared(run, len(prompts), new_tokens),
        "tokens_per_step": tokens_per_step,
        "acceptance": list(loop.values()),
        **speedups(pass_costs(model, half, batch=batch, clock=harness.clock)),
    }
    if compile:
        costs = pass_costs(model, half, compile=True, clock=harness.clock)
        result["compiled"] = speedups(costs, "compiled_")
        result["compiled_over_eager"] = run.speedup("compiled_speculative", "speculative")
        result["seconds_to_compile"] = built
    if batch > 1:
        one = {name: replace(way, batch_size=1) for name, way in ways.items()}
        alone = race(model, prompts[:batch], one, clock=harness.clock)
        result["against_single"] = {
            name: _PER_SLOT * sum(alone.seconds[name]) / median(run.seconds[name]) for name in WAYS
        }
    return result


def memory_rate(model: MTPModel, prompt: list[int], *, repeats: int) -> Row:
    """The rate at which passes of the trunk at batch 1 read its weights.

    A plain read of the same memory, its sum, takes turns with them. Empty without the C++.
    """
    with decoding_passes(model):
        parameters = nn.ModuleList([model.trunk, model.head]).parameters()  # shared ones once
        copies = [packed_of(weight) for weight in parameters]
        weights = [_as_fp32(copy.data) for copy in copies if copy is not None]
        if not weights:
            return {}
        session = TrunkSession(model, slots=1, capacity=len(prompt) + 8)
        session.join([prompt])

        def read() -> None:
            for weight in weights:
                weight.sum()

        widths = {f"pass_of_{width}": width - 1 for width in (1, 3)}
        passes = {name: partial(session.verify, n_drafts) for name, n_drafts in widths.items()}
        seconds = harness.median_times({"read": read, **passes}, repeats=repeats)
    n_bytes = sum(weight.nbytes for weight in weights)
    speeds = {f"{name}_gb_per_s": n_bytes / s / 1e9 for name, s in seconds.items()}
    share = {f"share_of_{name}": seconds["read"] / seconds[name] for name in widths}
    return {"megabytes": n_bytes / 1e6, **speeds, **share}


def _as_fp32(numbers: Tensor) -> Tensor:
    """The same bytes, without up to three at the end."""
    whole = numbers.view(torch.uint8)
    return whole[: whole.numel() // 4 * 4].view(torch.float32)


@contextmanager
def in_transformers(
    model: MTPModel, tokenizer: Any, *, positions: int, depth: int = 0
) -> Iterator[Any]:
    """transformers' model with the same weights in fp32, whose folder exists in the block."""
    from mtp_lightning.interop.transformers_model import Loaded
    from mtp_lightning.interop.writing import write_folder

    with tempfile.TemporaryDirectory() as name:
        sizes = {"max_positions": positions, "shard_bytes": 2**30}
        write_folder(Path(name), model, tokenizer, dtype="float32", **sizes)
        kind, n_layers = model_type(model.config), model.config.trunk.n_layers
        yield Loaded(Path(name), model_type=kind, n_layers=n_layers, depth=depth)


def against_transformers(
    model: MTPModel,
    prompt: list[int],
    ways: Mapping[str, Row],
    *,
    new_tokens: int,
    repeats: int,
) -> Row:
    """Greedy decoding next to transformers' of the exported model in fp32, in turns.

    Where transformers can (DeepSeek-V3 trunks with sequential modules), its ``use_mtp=True`` too.
    ``ways`` are options of ``generate`` by name; those with drafts are compared with its drafts.
    """
    drafts = model_type(model.config) == "deepseek_v3" and model.config.mtp.variant == "sequential"
    ids, passes = torch.tensor(prompt), 0
    texts: dict[str, list[int]] = {}
    positions, depth = len(prompt) + new_tokens + model.depth, model.depth if drafts else 0
    with in_transformers(model, ByteTokenizer(), positions=positions, depth=depth) as theirs:

        def decode_theirs(name: str) -> None:
            nonlocal passes
            use_mtp = name.endswith("use_mtp")
            # With use_mtp, generate() reads the modules from the folder in every call.
            texts[name], n_passes = theirs.greedy(ids, new_tokens, use_mtp=use_mtp)
            passes = n_passes if use_mtp else passes

        def decode_ours(name: str) -> None:
            (own,) = generate(model, [prompt], max_new_tokens=new_tokens, **ways[name])
            texts[name] = own.token_ids

        kinds = ("plain", "use_mtp") if drafts else ("plain",)
        sides = {f"transformers_{kind}": decode_theirs for kind in kinds}
        sides |= dict.fromkeys(ways, decode_ours)
        turns = {n: partial(harness.seconds_of, partial(way, n)) for n, way in sides.items()}
        # The first turn warms up.
        seconds = {n: own[1:] for n, own in harness.take_turns(turns, repeats + 1).items()}

    def over(slow: str, names: Iterable[str]) -> dict[str, float]:
        return {name: harness.ratio(seconds[slow], seconds[name]) for name in names}

    result: Row = {
        "tokens_per_second": {name: new_tokens / median(s) for name, s in seconds.items()},
        "over_transformers_plain": over("transformers_plain", ways),
    }
    if drafts:
        drafting = [name for name in ways if not name.endswith("plain")]
        use_mtp = "transformers_use_mtp"
        result["over_transformers_use_mtp"] = over(use_mtp, drafting)
        result["transformers_use_mtp_over_plain"] = over("transformers_plain", [use_mtp])[use_mtp]
        result["transformers_tokens_per_step"] = new_tokens / passes
    # Two implementations may round a near-tie differently.
    return result | {"greedy_equal": all(text == texts["plain"] for text in texts.values())}


def smollm2_shape() -> MTPModel:
    """Random weights in SmolLM2-135M's shape: half a gigabyte, more than caches hold."""
    trunk = TrunkConfig(
        vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536
    )
    model = MTPModel(ModelConfig(trunk=trunk, mtp=NoMTPConfig()))
    model.initialize(0)
    return model.eval()


@cli.command(quick={"repeats": 1}, cpu_time=True)
def decode(
    checkpoint: Sequence[Path] = (),
    train_steps: int = 300,
    new_tokens: int = 256,
    prompt_tokens: int = 32,
    batches: Sequence[int] = (1, 8),
    even: bool = False,
    repeats: int = 5,
    trees: Sequence[str] = (),
    temperature: float = 0.0,
    compile: bool = True,
    wide: bool = True,
) -> Row:
    """Plain and speculative decoding.

    Args:
        checkpoint: run folders or checkpoint files; without any, small models are trained.
        train_steps: steps of each of these.
        batches: sequences at once.
        even: give the prompts of a batch one length; sequences then begin and end together.
        trees: such as 3,2,1: measure only trees of drafts next to the chain.
        temperature: above 0: measure only the rules of verify=, in text sampled from 256 prompts.
        compile: leave out compiled passes.
        wide: leave out SmolLM2's shape.
    """
    if trees and temperature:
        raise SystemExit("Trees are measured greedily: leave out --trees or --temperature.")
    if temperature and 1 in batches:  # a race decodes them in a call each, as its first prompt
        raise SystemExit(
            "Prompts that are sampled one by one share their random numbers, and no interval over "
            "them holds: give --batches of 2 or more."
        )
    results: Row = {}

    def note(name: str, result: Row) -> None:
        results[name] = result
        print(name)
        for key, value in result.items():
            print(f"  {key:<32} {_short(value)}")

    own: Row = {"new_tokens": new_tokens, "repeats": repeats}
    ways = {**WAYS, **(COMPILED if compile else {})}
    with tempfile.TemporaryDirectory(prefix="mtp-bench-") as folder:
        for path in checkpoint or train_models(train_steps, Path(folder)):
            run, name = open_model(path), str(path) if checkpoint else path.name
            n_prompts = _SAMPLED if temperature else _PER_SLOT * max(batches)
            sizes: Row = {"n": n_prompts, "length": prompt_tokens}
            held_out = validation_data(run).held_out_prompts(**sizes)
            model, prompts = run.model, [prompt.tolist() for prompt in held_out]
            for batch in batches:
                if trees:
                    widths = [cli.whole_numbers(tree) for tree in trees]
                    found = measure_trees(model, prompts, widths, batch=batch, **own)
                    note(f"{name}, trees, batch {batch}", found)
                elif temperature:
                    found = measure_rules(
                        model, prompts, temperature=temperature, batch=batch, **own
                    )
                    note(f"{name}, rules of verification, batch {batch}", found)
                else:
                    how: Row = {"batch": batch, "compile": compile, "even": even}
                    note(f"{name}, batch {batch}", measure(model, prompts, **how, **own))
            if not trees and not temperature:
                note(f"{name}, memory", memory_rate(model, prompts[0], repeats=4 * repeats))
                if find_spec("transformers"):
                    found = against_transformers(model, prompts[0], ways, **own)
                    note(f"{name}, transformers", found)
    if wide and find_spec("transformers"):
        model, prompt = smollm2_shape(), list(range(1, prompt_tokens + 1))
        own["new_tokens"] = min(new_tokens, 48)
        for precision in ("fp32", "bf16", "int8"):
            use_precision(model, precision)
            found = against_transformers(model, prompt, {"plain": {}}, **own)
            rate = memory_rate(model, prompt, repeats=4 * repeats)
            note(f"SmolLM2's shape, {precision}", rate | found)
    return {"results": results}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(one)}" for key, one in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


main = cli.program(decode)

if __name__ == "__main__":
    main()

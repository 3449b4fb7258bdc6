"""Decoding speed: plain against speculative, and what the difference could be at most.

    python -m benchmarks.decode                          # trains a small model on bytes first
    python -m benchmarks.decode --checkpoint FILE        # a checkpoint of train.py, or a run folder

Every comparison is of the same greedy tokens, which is checked. ``possible`` is the speed-up that
tokens_per_step and the measured cost of one verify and one draft pass allow; ``share`` is how much
of it is reached. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data_modules.windows import WindowBatch
from mtp_lightning.decoding import Generation, generate
from mtp_lightning.decoding.session import Session
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.linear import packed_weights
from mtp_lightning.objective.mtp_loss import mtp_loss


def library_bytes(limit: int = 2_000_000) -> torch.Tensor:
    """The standard library's sources as byte ids."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes() + b"\n"
        if len(text) > limit:
            break
    return torch.tensor(list(text[:limit]))


def train(model: MTPModel, tokens: torch.Tensor, *, seconds: float, seq_len: int = 128) -> float:
    """Train for some seconds with lambda 0.3. Returns the last step's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    width, batch_size, loss = seq_len + model.depth + 1, 16, torch.tensor(0.0)
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, elapsed / seconds * 20) * (1 - 0.9 * elapsed / seconds)
        starts = torch.randint(0, len(tokens) - width, (batch_size, 1), generator=generator)
        batch = WindowBatch(tokens[starts + torch.arange(width)], model.depth)
        weights = [0.3 / model.depth] * model.depth
        loss, _ = mtp_loss(model, batch, weights, batch.counts().tolist())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


def built_in_model(vocab_size: int) -> MTPModel:
    """d_model 256, 6 layers, D = 2."""
    trunk = TrunkConfig(
        vocab_size=vocab_size, d_model=256, n_layers=6, n_heads=4, n_kv_heads=4, d_ff=704
    )
    model = MTPModel(ModelConfig(trunk=trunk, mtp=SequentialConfig(depth=2)))
    model.initialise(0)
    return model


def load(path: Path, text: torch.Tensor) -> tuple[MTPModel, torch.Tensor]:
    """A trained model, and the text as its tokenizer has it."""
    from data_modules.tokenizers import tokenizer_from_state
    from mtp_lightning.runs import load_run

    run = load_run(path)
    tokenizer = tokenizer_from_state(run.tokenizer_state)
    ids = tokenizer.encode(bytes(text.tolist()).decode(errors="replace"))
    return run.model, torch.as_tensor(ids, dtype=torch.int64)


def microseconds(call: Callable[[], Any], *, repeats: int = 60) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats + 10):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * median(times[10:])


def pass_costs(model: MTPModel, prompt: list[int], batch: int) -> dict[str, list[float]]:
    """Microseconds of a verify pass of 1 .. D + 1 tokens, and of every depth's draft step."""
    with torch.inference_mode(), packed_weights(model):
        session = Session(model, [prompt] * batch, capacity=len(prompt) + 64, max_draft=model.depth)
        session.prefill([len(prompt)] * batch)
        verify = [
            microseconds(lambda m=m: session.verify(m).argmax(-1).tolist())
            for m in range(model.depth + 1)
        ]
        draft = []
        for k in range(1, model.depth + 1):
            session.draft(k)

            def step(k: int = k) -> None:
                # As after a round that accepted about half: two positions to bring up to date.
                session.filled[k] = [n - max(2, k) for n in session.n]
                session.put(session.draft(k).argmax(-1, keepdim=True), k)

            draft.append(microseconds(step))
    return {"verify_us": verify, "draft_us": draft}


def measure(
    model: MTPModel, prompts: list[list[int]], *, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Plain, speculative and adaptive decoding of a batch: tokens/s and how they compare."""
    modes: dict[str, dict[str, Any]] = {
        "plain": {"speculative": False},
        "speculative": {},
        "auto": {"draft_depth": "auto"},
    }
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    outputs: dict[str, list[Generation]] = {}
    for _ in range(repeats):
        # In turn, so that a busy neighbour hits all alike.
        for name, options in modes.items():
            outputs[name] = generate(model, prompts, max_new_tokens=new_tokens, **options)
            seconds[name].append(max(g.seconds for g in outputs[name]))
    wanted = [g.token_ids for g in outputs["plain"]]
    equal = all([g.token_ids for g in out] == wanted for out in outputs.values())
    spec = outputs["speculative"]
    passes = sum(g.verify_passes for g in spec)
    tokens_per_step = sum(g.tokens_per_step * g.verify_passes for g in spec) / max(passes, 1)
    depth = len(spec[0].drafts_reached)
    accepted = [sum(g.drafts_accepted[j] for g in spec) for j in range(depth)]
    reached = [sum(g.drafts_reached[j] for g in spec) for j in range(depth)]
    total = len(prompts) * new_tokens
    costs = pass_costs(model, prompts[0] + wanted[0][: new_tokens // 2], len(prompts))
    verify, draft = costs["verify_us"], costs["draft_us"]
    possible = tokens_per_step * verify[0] / (verify[-1] + sum(draft))
    ratios = {
        name: median(p / s for p, s in zip(seconds["plain"], seconds[name], strict=True))
        for name in ("speculative", "auto")
    }
    return {
        "batch": len(prompts),
        "tokens_per_second": {n: total / median(s) for n, s in seconds.items()},
        "tokens_per_step": tokens_per_step,
        "acceptance": [a / max(r, 1) for a, r in zip(accepted, reached, strict=True)],
        "speedup": ratios["speculative"],
        "auto_speedup": ratios["auto"],
        "possible": possible,
        "share": ratios["speculative"] / possible,
        "greedy_equal": equal,
        **costs,
    }


def show(name: str, result: dict[str, Any]) -> None:
    """One line a result."""
    rate = result["tokens_per_second"]
    print(
        f"{name:<18} batch {result['batch']}: plain {rate['plain']:.0f} tok/s, speculative "
        f"{rate['speculative']:.0f}, auto {rate['auto']:.0f}; speed-up {result['speedup']:.2f} of "
        f"{result['possible']:.2f} possible ({100 * result['share']:.0f} %), auto "
        f"{result['auto_speedup']:.2f}\n{'':<18} tokens/step {result['tokens_per_step']:.2f}, "
        f"acceptance {[round(a, 3) for a in result['acceptance']]}, verify us "
        f"{[round(v) for v in result['verify_us']]}, draft us "
        f"{[round(v) for v in result['draft_us']]}, greedy equal: {result['greedy_equal']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint or run folder")
    parser.add_argument("--train-seconds", type=float, default=60.0)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/decode.json"))
    args = parser.parse_args()
    text = library_bytes()
    held_out = text[-100_000:]
    models: dict[str, MTPModel] = {}
    if args.checkpoint:
        models[str(args.checkpoint)], held_out = load(args.checkpoint, held_out)
    else:
        trained = built_in_model(257)
        if args.train_seconds > 0:
            loss = train(trained, text[:-100_000], seconds=args.train_seconds)
            print(f"trained {args.train_seconds:.0f} s on bytes, loss with depths {loss:.2f}")
        models = {"trained V=257": trained, "random V=4096": built_in_model(4096)}
    results = {}
    for name, model in models.items():
        vocab = model.config.trunk.vocab_size
        for batch in args.batches:
            gap = (len(held_out) - args.prompt_tokens) // batch
            starts = range(0, batch * gap, gap)
            # The random model takes any id below its vocabulary.
            prompts = [(held_out[s : s + args.prompt_tokens] % vocab).tolist() for s in starts]
            key = f"{name}, batch {batch}"
            results[key] = measure(model, prompts, new_tokens=args.new_tokens, repeats=args.repeats)
            show(name, results[key])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(
        json.dumps({"threads": torch.get_num_threads(), "results": results}, indent=2) + "\n"
    )
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

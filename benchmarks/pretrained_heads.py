"""What heads on a pretrained trunk bring: drafted decoding against plain, and against transformers.

    python -m benchmarks.pretrained_heads runs/smollm2 [--output FILE.json] [--figure FILE.svg]

Held-out prompts of three kinds, greedily and at temperature 1, one at a time. All ways take turns
at every prompt, so that a busy neighbour hits all alike; ratios are of CPU seconds (of one thread)
and of wall-clock. Greedy texts must be the same, token for token; transformers' too, but where two
tokens are a tie. Acceptance and the cost of single passes say what bounds the rest.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_limits import in_transformers
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.measure import pass_costs, require_same_greedy
from mtp_lightning.decoding.sequence import Generation, rates
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.opening import open_model

PROMPTS = {
    "code": [
        "def moving_average(values, width):\n    ",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self",
        "import csv\n\nwith open('prices.csv') as file:\n    for row in",
        "SELECT name, age\nFROM people\nWHERE",
    ],
    "prose": [
        "The old lighthouse stood at the end of the pier, and every evening",
        "Bread is one of the oldest prepared foods. It is made from",
        "In the winter of that year the two sisters decided to",
        "The heart is a muscle that pumps blood through",
    ],
    "chat": [
        "What is the difference between a lake and a pond?",
        "Give me three tips for learning a new language.",
        "Write a short poem about rain.",
        "How do I boil an egg?",
    ],
}
CHAT = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


def prompt_ids(tokenizer: Any, kind: str, text: str) -> list[int]:
    """Token ids of a prompt; a question in the chat format."""
    ids = tokenizer.encode(text).tolist()
    if kind != "chat":
        return ids
    before, after = (tokenizer.encode_specials(part).tolist() for part in CHAT)
    return [*before, *ids, *after]


class Transformers:
    """transformers' model with the weights of a trunk, by way of a folder."""

    def __init__(self, model: MTPModel, tokenizer: Any) -> None:
        config = ModelConfig(trunk=model.config.trunk, mtp=NoMTPConfig())
        trunk = MTPModel(config)
        state = model.state_dict()
        trunk.load_state_dict({n: t for n, t in state.items() if not n.startswith("mtp.")})
        with in_transformers(trunk, tokenizer, positions=8192, depth=0) as theirs:
            missing, unexpected = theirs.missing, theirs.unexpected
            self.model = theirs.model
        assert not missing and not unexpected, (missing, unexpected)

    @torch.inference_mode()
    def __call__(self, prompt: list[int], n_new: int, temperature: float) -> list[int]:
        out = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_k": 0} if temperature else {}),
        )
        return out[0, len(prompt) :].tolist()


def measure(
    model: MTPModel,
    tokenizer: Any,
    *,
    new_tokens: int,
    n_prompts: int,
    depths: list[int],
    vocabularies: list[int],
) -> list[dict[str, Any]]:
    """A row for every kind of prompt and temperature."""
    ways: dict[str, dict[str, Any]] = {"plain": {"speculative": False}}
    ways |= {f"drafts_{depth}": {"draft_depth": depth} for depth in depths}
    ways |= {
        f"drafts_{depth}_of_{size}": {"draft_depth": depth, "draft_vocab": size}
        for size in vocabularies
        for depth in depths
    }
    theirs = Transformers(model, tokenizer)
    rows = []
    for temperature in (0.0, 1.0):
        for kind, texts in PROMPTS.items():
            prompts = [prompt_ids(tokenizer, kind, text) for text in texts[:n_prompts]]
            outputs: dict[str, list[Generation]] = {name: [] for name in ways}
            wall = dict.fromkeys([*ways, "transformers"], 0.0)
            cpu = dict(wall)
            same = 0
            options = {"temperature": temperature, "batch_size": 1, "max_new_tokens": new_tokens}
            for own in ways.values():  # builds what is built once
                generate(model, prompts[:1], **{**options, "max_new_tokens": 4}, **own)
            theirs(prompts[0], 4, temperature)
            for number, prompt in enumerate(prompts):
                order = [*ways, "transformers"]
                for name in order if number % 2 == 0 else reversed(order):
                    began, cpu_began = time.perf_counter(), time.process_time()
                    if name == "transformers":
                        said = theirs(prompt, new_tokens, temperature)
                    else:
                        outputs[name] += generate(
                            model, [prompt], seed=number, **options, **ways[name]
                        )
                    wall[name] += time.perf_counter() - began
                    cpu[name] += time.process_time() - cpu_began
                same += said == outputs["plain"][-1].token_ids
            if not temperature:
                for name in list(ways)[1:]:
                    require_same_greedy(model, prompts, outputs["plain"], outputs[name])
            tokens = new_tokens * len(prompts)
            row: dict[str, Any] = {"kind": kind, "temperature": temperature, "tokens": tokens}
            if not temperature:
                row["equal_to_transformers"] = f"{same} of {len(prompts)}"
            for name in wall:
                row[name] = {
                    "tokens_per_cpu_second": tokens / cpu[name],
                    "tokens_per_second": tokens / wall[name],
                    "over_plain_cpu": cpu["plain"] / cpu[name],
                    "over_plain": wall["plain"] / wall[name],
                    "over_transformers_cpu": cpu["transformers"] / cpu[name],
                    **(rates(outputs[name]) if name.startswith("drafts") else {}),
                }
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    drafts = [name for name in row if name.startswith("drafts")]
    parts = []
    for name in drafts:
        asked, way = name.removeprefix("drafts_").replace("_", " "), row[name]
        parts.append(
            f"drafts {asked}: {way['tokens_per_step']:.2f} tokens a pass, "
            f"{way['over_plain_cpu']:.2f} x plain (cpu), {way['over_plain']:.2f} (wall), "
            f"{way['over_transformers_cpu']:.2f} x transformers"
        )
    kind = f"{row['kind']}, temperature {row['temperature']:g}"
    plain = row["plain"]["tokens_per_cpu_second"]
    return f"{kind}: plain {plain:.1f} tokens a CPU second; " + "; ".join(parts)


def figure(rows: list[dict[str, Any]], file: Path) -> None:
    """Speed over plain decoding by kind of prompt, a bar a number of drafts."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    ways = [name for name in rows[0] if name.startswith("drafts") or name == "transformers"]
    fig, axes = plt.subplots(figsize=(8, 3.2))
    width = 0.8 / len(ways)
    for index, name in enumerate(ways):
        places = [i + (index - (len(ways) - 1) / 2) * width for i in range(len(rows))]
        label = name.replace("drafts_", "drafts: ").replace("_", " ")
        axes.bar(places, [row[name]["over_plain_cpu"] for row in rows], width, label=label)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [f"{r['kind']}\nT = {r['temperature']:g}" for r in rows])
    axes.set_ylabel("speed over plain decoding")
    axes.legend(fontsize=8, ncols=len(ways))
    fig.tight_layout()
    fig.savefig(file, metadata={"Date": None})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run folder, a checkpoint or a Hugging Face folder")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=4, help="of each kind, up to 4")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2], help="drafts a round")
    parser.add_argument(
        "--draft-vocab", type=int, nargs="*", default=[8192], help="drafts of so many tokens, too"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = open_model(args.run)
    rows = measure(
        run.model,
        run.tokenizer,
        new_tokens=args.new_tokens,
        n_prompts=args.prompts,
        depths=args.drafts,
        vocabularies=args.draft_vocab,
    )
    costs = pass_costs(run.model, prompt_ids(run.tokenizer, "prose", PROMPTS["prose"][0]),
                       repeats=20)  # fmt: skip
    found = {"rows": rows, "verify_seconds": costs.verify, "draft_seconds": costs.draft}
    print("a verify pass over 1, 2, .. tokens:", [f"{1e3 * s:.1f} ms" for s in costs.verify])
    print("a draft of depth 1, 2, ..:", [f"{1e3 * s:.1f} ms" for s in costs.draft])
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if args.figure is not None:
        figure(rows, args.figure)


if __name__ == "__main__":
    main()

"""Heads on a pretrained trunk: drafted decoding next to plain decoding and transformers.

    python -m benchmarks.pretrained_heads runs/smollm2 [--output FILE.json] [--figure FILE.svg]

Prompts of three kinds are decoded one at a time, greedily and at temperature 1. All ways take turns
at every prompt; ratios are of CPU seconds (of one thread) and of wall-clock. Greedy texts with and
without drafts must be the same, token for token; how many of them are transformers', too, is
counted. Acceptance and the cost of single passes tell what bounds the speed-up.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cli
from benchmarks.decode import in_transformers
from benchmarks.harness import Row, progress
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.measure import pass_costs, require_same_greedy
from mtp_lightning.decoding.sequence import rates
from mtp_lightning.experiment.generating import open_to_decode
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.opening import open_model
from mtp_lightning.system import processor

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
    """transformers' model with the weights of a trunk."""

    def __init__(self, model: MTPModel, tokenizer: Any) -> None:
        trunk = MTPModel(ModelConfig(trunk=model.config.trunk, mtp=NoMTPConfig()))
        state = model.state_dict()
        trunk.load_state_dict({n: t for n, t in state.items() if not n.startswith("mtp.")})
        with in_transformers(trunk, tokenizer, positions=8192) as theirs:
            assert not theirs.missing and not theirs.unexpected, (theirs.missing, theirs.unexpected)
            self.model = theirs.model

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
    theirs: Transformers,
    tokenizer: Any,
    ways: dict[str, Row],
    *,
    new_tokens: int,
    n_prompts: int,
) -> list[Row]:
    """A row for every kind of prompt and temperature.

    Args:
        model: a trunk with heads.
        theirs: its trunk.
        tokenizer: its tokenizer.
        ways: name -> options of ``generate``; ``plain`` comes first.
        new_tokens: tokens of a text.
        n_prompts: prompts of each kind.
    """
    names = [*ways, "transformers"]

    def decode(name: str, prompt: list[int], n_new: int, seed: int, temperature: float) -> Row:
        began, cpu_began = time.perf_counter(), time.process_time()
        if name == "transformers":
            ids, own = theirs(prompt, n_new, temperature), None
        else:
            options = {"temperature": temperature, "batch_size": 1, "seed": seed, **ways[name]}
            (own,) = generate(model, [prompt], max_new_tokens=n_new, **options)
            ids = own.token_ids
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        return {"ids": ids, "generation": own, "wall": wall, "cpu": cpu}

    rows = []
    for temperature, (kind, texts) in itertools.product((0.0, 1.0), PROMPTS.items()):
        progress(f"{kind}, temperature {temperature:g}")
        prompts = [prompt_ids(tokenizer, kind, text) for text in texts[:n_prompts]]
        for name in names:
            decode(name, prompts[0], 4, 0, temperature)  # warms up
        found: dict[str, list[Row]] = {name: [] for name in names}
        for number, prompt in enumerate(prompts):
            for name in names if number % 2 == 0 else reversed(names):
                found[name].append(decode(name, prompt, new_tokens, number, temperature))
        said = {name: [one["generation"] for one in found[name]] for name in ways}
        tokens = new_tokens * len(prompts)
        row: Row = {"kind": kind, "temperature": temperature, "tokens": tokens}
        if not temperature:
            for name in list(ways)[1:]:
                require_same_greedy(model, prompts, said["plain"], said[name])
            pairs = zip(found["transformers"], found["plain"], strict=True)
            same = sum(a["ids"] == b["ids"] for a, b in pairs)
            row["equal_to_transformers"] = f"{same} of {len(prompts)}"
        wall, cpu = (
            {name: sum(one[clock] for one in own) for name, own in found.items()}
            for clock in ("wall", "cpu")
        )
        for name in names:
            row[name] = {
                "tokens_per_cpu_second": tokens / cpu[name],
                "tokens_per_second": tokens / wall[name],
                "over_plain_cpu": cpu["plain"] / cpu[name],
                "over_plain": wall["plain"] / wall[name],
                "over_transformers_cpu": cpu["transformers"] / cpu[name],
                **(rates(said[name]) if name.startswith("drafts") else {}),
            }
        rows.append(row)
    return rows


def draw(rows: list[Row], file: Path) -> None:
    """Speed over plain decoding by kind of prompt, a bar for each way."""
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


@cli.command()
def pretrained_heads(
    run: str,
    /,
    new_tokens: int = 64,
    prompts: int = 4,
    drafts: Sequence[int] = (1, 2),
    draft_vocab: Sequence[int] = (8192,),
    head_precision: str = "fp32",
    figure: Path | None = None,
) -> Row:
    """All prompts, and the passes of a round of decoding.

    Args:
        run: a run folder, a checkpoint or a Hugging Face folder.
        prompts: prompts of each kind, up to 4.
        drafts: drafts a round.
        draft_vocab: sizes of the vocabulary that drafts are also chosen from.
        head_precision: of the modules' own matrices.
        figure: an SVG file for a figure of speed over plain decoding.
    """
    torch.set_num_threads(1)
    opened = open_to_decode(run, head_precision=head_precision)
    theirs = Transformers(open_model(run).model, opened.tokenizer)
    ways: dict[str, Row] = {"plain": {"speculative": False}}
    ways |= {f"drafts_{depth}": {"draft_depth": depth} for depth in drafts}
    ways |= {
        f"drafts_{depth}_of_{size}": {"draft_depth": depth, "draft_vocab": size}
        for size in draft_vocab
        for depth in drafts
    }
    sizes = {"new_tokens": new_tokens, "n_prompts": prompts}
    rows = measure(opened.model, theirs, opened.tokenizer, ways, **sizes)
    cli.print_table(
        f"{run}: CPU seconds of one thread; x plain also in wall-clock",
        "prompts: kind; temperature: temperature; way: way; tokens per pass: tokens_per_step .2f; "
        "tokens/s: tokens_per_cpu_second .1f; x plain: over_plain_cpu .2f; "
        "wall: over_plain .2f; x transformers: over_transformers_cpu .2f",
        [{**row, "way": way, **row[way]} for row in rows for way in (*ways, "transformers")],
    )
    prompt = prompt_ids(opened.tokenizer, "prose", PROMPTS["prose"][0])
    costs = pass_costs(opened.model, prompt, repeats=20)
    print("a verify pass over 1, 2, .. tokens:", [f"{1e3 * s:.1f} ms" for s in costs.verify])
    print("a draft of depth 1, 2, ..:", [f"{1e3 * s:.1f} ms" for s in costs.draft])
    if figure is not None:
        draw(rows, figure)
    return {
        "processor": processor(),
        "rows": rows,
        "verify_seconds": costs.verify,
        "draft_seconds": costs.draft,
    }


main = cli.program(pretrained_heads)

if __name__ == "__main__":
    main()

"""What heads on a pretrained trunk bring: drafted decoding, plain decoding, and transformers.

    python -m benchmarks.pretrained_heads runs/smollm2 [--output FILE.json] [--figure FILE.svg]

Held-out prompts of three kinds, greedily and at temperature 1, one at a time. All ways take turns
at every prompt; ratios are of CPU seconds (of one thread) and of wall-clock. Greedy texts must be
the same, token for token; transformers' too, except where two tokens tie. Acceptance and the cost
of single passes say what bounds the rest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cli
from benchmarks.decode_limits import in_transformers
from benchmarks.harness import Row
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.measure import pass_costs, require_same_greedy
from mtp_lightning.decoding.sequence import rates
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
    depths: Sequence[int],
    vocabularies: Sequence[int],
) -> list[Row]:
    """A row for every kind of prompt and temperature."""
    ways: dict[str, Row] = {"plain": {"speculative": False}}
    ways |= {f"drafts_{depth}": {"draft_depth": depth} for depth in depths}
    ways |= {
        f"drafts_{depth}_of_{size}": {"draft_depth": depth, "draft_vocab": size}
        for size in vocabularies
        for depth in depths
    }
    theirs = Transformers(model, tokenizer)

    def decode(name: str, prompt: list[int], n_new: int, seed: int, temperature: float) -> Row:
        began, cpu_began = time.perf_counter(), time.process_time()
        if name == "transformers":
            ids, own = theirs(prompt, n_new, temperature), None
        else:
            options = {"temperature": temperature, "batch_size": 1, "seed": seed, **ways[name]}
            (own,) = generate(model, [prompt], max_new_tokens=n_new, **options)
            ids = own.token_ids
        seconds = {
            "wall": time.perf_counter() - began,
            "cpu": time.process_time() - cpu_began,
        }
        return {"ids": ids, "generation": own, **seconds}

    names, rows = [*ways, "transformers"], []
    for temperature in (0.0, 1.0):
        for kind, texts in PROMPTS.items():
            prompts = [prompt_ids(tokenizer, kind, text) for text in texts[:n_prompts]]
            found: dict[str, list[Row]] = {name: [] for name in names}
            for name in names:  # builds what is built once
                decode(name, prompts[0], 4, 0, temperature)
            for number, prompt in enumerate(prompts):
                for name in names if number % 2 == 0 else reversed(names):
                    found[name].append(decode(name, prompt, new_tokens, number, temperature))
            said = {name: [one["generation"] for one in found[name]] for name in ways}
            if not temperature:
                for name in list(ways)[1:]:
                    require_same_greedy(model, prompts, said["plain"], said[name])
            tokens = new_tokens * len(prompts)
            row: Row = {"kind": kind, "temperature": temperature, "tokens": tokens}
            if not temperature:
                pairs = zip(found["transformers"], found["plain"], strict=True)
                same = sum(a["ids"] == b["ids"] for a, b in pairs)
                row["equal_to_transformers"] = f"{same} of {len(prompts)}"
            sums = {
                clock: {name: sum(one[clock] for one in own) for name, own in found.items()}
                for clock in ("wall", "cpu")
            }
            for name in names:
                row[name] = {
                    "tokens_per_cpu_second": tokens / sums["cpu"][name],
                    "tokens_per_second": tokens / sums["wall"][name],
                    "over_plain_cpu": sums["cpu"]["plain"] / sums["cpu"][name],
                    "over_plain": sums["wall"]["plain"] / sums["wall"][name],
                    "over_transformers_cpu": sums["cpu"]["transformers"] / sums["cpu"][name],
                    **(rates(said[name]) if name.startswith("drafts") else {}),
                }
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    drafts = [name for name in row if name.startswith("drafts")]
    parts = []
    for name in drafts:
        asked, way = name.removeprefix("drafts_").replace("_", " "), row[name]
        parts.append(
            f"drafts {asked}: {way['tokens_per_step']:.2f} tokens per pass, "
            f"{way['over_plain_cpu']:.2f} x plain (cpu), {way['over_plain']:.2f} (wall), "
            f"{way['over_transformers_cpu']:.2f} x transformers"
        )
    kind = f"{row['kind']}, temperature {row['temperature']:g}"
    plain = row["plain"]["tokens_per_cpu_second"]
    return f"{kind}: plain {plain:.1f} tokens a CPU second; " + "; ".join(parts)


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
    figure: Path | None = None,
) -> Row:
    """All prompts, and the passes that a round of decoding consists of.

    Args:
        run: a run folder, a checkpoint or a Hugging Face folder.
        new_tokens: of a prompt.
        prompts: of each kind, up to 4.
        drafts: a round.
        draft_vocab: drafts of so many tokens, too.
        figure: an SVG file of speed over plain decoding.
    """
    torch.set_num_threads(1)
    opened = open_model(run)
    rows = measure(
        opened.model,
        opened.tokenizer,
        new_tokens=new_tokens,
        n_prompts=prompts,
        depths=drafts,
        vocabularies=draft_vocab,
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

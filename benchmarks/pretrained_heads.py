"""Heads on a pretrained trunk: drafted decoding next to plain decoding and transformers.

    python -m benchmarks.pretrained_heads runs/smollm2 [--output FILE.json] [--llama-cpp FILE.gguf]

Prompts of three kinds are decoded one at a time, greedily and at temperature 1, with fixed numbers
of drafts, with the number that pays (``drafts_that_pay``, the default of generate.py), with drafts
that are looked up in the text, and with both (``drafts_of_both``). All ways take turns at every
prompt; ratios are of CPU seconds and, for several threads, of wall-clock. Greedy texts with and
without drafts must be the same, token for token; how many of them are transformers', too, is
counted.
``benchmarks.rounds`` has the cost of single passes, which bounds the speed-up.
``python -m benchmarks.decoding_figure FILE.svg`` draws the stored results of all processors.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import cli, harness
from benchmarks.decode import in_transformers
from benchmarks.harness import Row
from mtp_lightning.cpu.packed import packed_of
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.measure import require_same_greedy
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.paying import with_measured_depth
from mtp_lightning.decoding.sequence import rates
from mtp_lightning.experiment.generating import open_for_decoding
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.opening import open_model
from mtp_lightning.run.layout import SUMMARY_FILE
from mtp_lightning.stored import read_json
from mtp_lightning.system import processor
from sweeps.report.statistics import ratio_interval

PROMPTS = {
    "code": [
        "def moving_average(values, width):\n    ",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self",
        "import csv\n\nwith open('prices.csv') as file:\n    for row in",
        "SELECT name, age\nFROM people\nWHERE",
        "def is_prime(n):\n    if n < 2:\n        return False\n    for",
        "import os\nfrom pathlib import Path\n\n\ndef largest_files(folder",
        "<html>\n  <head>\n    <title>Menu</title>\n  </head>\n  <body>",
        "for i in range(1, 101):\n    if i % 15 == 0:\n        print(",
        "class Point:\n    def __init__(self, x, y):",
        "function add(a, b) {\n  return a + b;\n}\n\nfunction multiply(",
        "def test_the_empty_list():\n    assert mean([]) is None\n\n\ndef test_",
        "try:\n    value = int(input('How many? '))\nexcept ValueError:\n    ",
    ],
    "prose": [
        "The old lighthouse stood at the end of the pier, and every evening",
        "Bread is one of the oldest prepared foods. It is made from",
        "In the winter of that year the two sisters decided to",
        "The heart is a muscle that pumps blood through",
        "Mountains are formed when two plates of the earth's crust",
        "She opened the letter slowly. It was from her brother, who",
        "The city has three markets, and the largest of them",
        "Many birds fly south in autumn because",
        "A good teacher does not only explain, but also",
        "The first trains were slow, loud and dirty, yet people",
        "When the rain stopped, the children ran out to",
        "Iron is found in the ground as ore, which must be",
    ],
    "chat": [
        "What is the difference between a lake and a pond?",
        "Give me three tips for learning a new language.",
        "Write a short poem about rain.",
        "How do I boil an egg?",
        "Why is the sky blue?",
        "Explain what a computer program is to a child.",
        "Name five animals that live in the desert.",
        "What should I pack for a week in the mountains?",
        "Write an email that asks a colleague for a meeting.",
        "How does a bicycle stay upright?",
        "Summarize the story of Cinderella in three sentences.",
        "What are the pros and cons of working from home?",
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
    def __call__(self, prompt: list[int], n_new: int, seed: int, temperature: float) -> list[int]:
        out = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_k": 0} if temperature else {}),
        )
        return out[0, len(prompt) :].tolist()


# (prompt, number of new tokens, seed, temperature) -> token ids, and the seconds that they took.
Text = Callable[[list[int], int, int, float], Row]


def timed(decode: Callable[..., Any]) -> Text:
    """A :data:`Text` that calls ``decode``, which returns the ids, and measures the call."""
    return lambda *args: harness.timed(partial(decode, *args))


def of_model(model: MTPModel, way: Row) -> Text:
    """Decoding by this project with options of ``generate``; the ids come as a ``Generation``."""

    def decode(prompt: list[int], n_new: int, seed: int, temperature: float) -> Any:
        options = {"temperature": temperature, "batch_size": 1, "seed": seed, **way}
        return generate(model, [prompt], max_new_tokens=n_new, **options)[0]

    return timed(decode)


WARM_UP = 4


def groups(tokenizer: Any, n_prompts: int) -> Iterator[tuple[float, str, list[list[int]]]]:
    """Temperature, kind and prompts, in the order in which they are decoded."""
    for temperature, (kind, texts) in itertools.product((0.0, 1.0), PROMPTS.items()):
        yield temperature, kind, [prompt_ids(tokenizer, kind, t) for t in texts[:n_prompts]]


@contextmanager
def by_llama_cpp(
    file: str, python: str, tokenizer: Any, *, new_tokens: int, n_prompts: int
) -> Iterator[Text]:
    """llama.cpp's decoding of a GGUF file, in a process that knows the texts and their order."""
    jobs = [
        (prompt, n, temperature)
        for temperature, _, prompts in groups(tokenizer, n_prompts)
        for prompt, n in [(prompts[0], WARM_UP), *((prompt, new_tokens) for prompt in prompts)]
    ]
    with harness.Worker(
        "benchmarks.llama_cpp:texts", {"model": file, "jobs": jobs}, python=python
    ) as it:
        yield lambda *_: it.turn()


def measure(
    model: MTPModel,
    ways: dict[str, Text],
    tokenizer: Any,
    *,
    new_tokens: int,
    n_prompts: int,
) -> list[Row]:
    """A row for every kind of prompt and temperature. Of the ways, ``plain`` comes first, and the
    names of those that draft begin with ``drafts``."""
    rows = []
    for temperature, kind, prompts in groups(tokenizer, n_prompts):
        harness.progress(f"{kind}, temperature {temperature:g}")
        for text in ways.values():
            text(prompts[0], WARM_UP, 0, temperature)
        found: dict[str, list[Row]] = {name: [] for name in ways}
        for number, prompt in enumerate(prompts):
            for name in ways if number % 2 == 0 else reversed(ways):
                found[name].append(ways[name](prompt, new_tokens, number, temperature))
        drafted = [name for name in ways if name.startswith("drafts")]
        said = {name: [one["result"] for one in found[name]] for name in ("plain", *drafted)}
        tokens = new_tokens * len(prompts)
        row: Row = {"kind": kind, "temperature": temperature, "tokens": tokens}
        if not temperature:
            for name in drafted:
                require_same_greedy(model, prompts, said["plain"], said[name])
            pairs = zip(found["transformers"], said["plain"], strict=True)
            same = sum(a["result"] == b.token_ids for a, b in pairs)
            row["equal_to_transformers"] = f"{same} of {len(prompts)}"
        wall, cpu = (
            {name: sum(one[clock] for one in own) for name, own in found.items()}
            for clock in ("wall", "cpu")
        )
        for name in ways:
            row[name] = {
                "tokens_per_cpu_second": tokens / cpu[name],
                "tokens_per_second": tokens / wall[name],
                "over_plain_cpu": cpu["plain"] / cpu[name],
                "over_plain_cpu_interval": _interval(found["plain"], found[name], "cpu"),
                "over_plain": wall["plain"] / wall[name],
                "over_plain_interval": _interval(found["plain"], found[name], "wall"),
                "over_transformers_cpu": cpu["transformers"] / cpu[name],
                **(rates(said[name]) if name in drafted else {}),
            }
        rows.append(row)
    return rows


def _interval(plain: list[Row], other: list[Row], clock: str) -> tuple[float, float] | None:
    """95 % interval of the ratio of seconds over texts like these."""
    pairs = zip(plain, other, strict=True)
    return ratio_interval([ours[clock] / theirs[clock] for ours, theirs in pairs]).ends


def memory_limit(model: MTPModel) -> float:
    """Tokens per second of a processor that does nothing but read every weight once a token, as
    fast as one thread here reads as many bytes."""
    packed = (packed_of(weight) for weight in model.parameters())
    n_bytes = sum(x.data.numel() for x in packed if x is not None)
    numbers = torch.ones((n_bytes or sum(w.nbytes for w in model.parameters())) // 4)
    return 1 / min(harness.seconds_of(lambda: torch.dot(numbers, numbers)) for _ in range(20))


def agreement(run: Path) -> float | None:
    """The share of held-out tokens at which the first head and the trunk agree, of a run."""
    with suppress(OSError):
        return read_json(run / SUMMARY_FILE).get("val/agreement_depth_1")
    return None


@cli.command()
def pretrained_heads(
    run: str,
    /,
    new_tokens: int = 64,
    prompts: int = 12,
    drafts: Sequence[int] = (1, 2),
    draft_vocab: Sequence[int] = (8192,),
    lookup: int = 8,
    head_precision: str = "auto",
    activations: str = "fp32",
    threads: int = 1,
    llama_cpp: str = "",
    python: str = sys.executable,
) -> Row:
    """All prompts by all ways.

    Args:
        run: a run folder, a checkpoint or a Hugging Face folder.
        prompts: prompts of each kind, up to 12.
        drafts: drafts a round.
        draft_vocab: sizes of the vocabulary that drafts are also chosen from.
        lookup: drafts a round that are looked up in the text, alone and with the drafts that pay.
        head_precision: of the modules' own matrices.
        activations: of products with weights in blocks; int8 makes them of integers.
        threads: PyTorch's threads; llama.cpp has one.
        llama_cpp: the trunk as a GGUF file, which llama.cpp decodes as well.
        python: the interpreter of the environment that has llama-cpp-python.
    """
    torch.set_num_threads(threads)
    opened = open_for_decoding(run, head_precision=head_precision, activations=activations)
    theirs, tokenizer = Transformers(open_model(run).model, opened.tokenizer), opened.tokenizer
    options: dict[str, Row] = {"plain": {"speculative": False}}
    options |= {f"drafts_{depth}": {"draft_depth": depth} for depth in drafts}
    options |= {
        f"drafts_{depth}_of_{size}": {"draft_depth": depth, "draft_vocab": size}
        for size in draft_vocab
        for depth in drafts
    }
    short = draft_vocab[0] if draft_vocab else None
    default = DecodingOptions(draft_vocab=short, max_context=opened.seq_len)
    settled = with_measured_depth(default, opened, rows=1, on=[head_precision, activations])
    options["drafts_that_pay"] = pay = {
        "draft_depth": settled.draft_depth, "measured": settled.measured, "draft_vocab": short
    }  # fmt: skip
    if lookup:
        options["drafts_of_the_text"] = {"speculative": False, "lookup": lookup}
        options["drafts_of_both"] = pay | {"lookup": lookup}
    ways = {name: of_model(opened.model, way) for name, way in options.items()}
    ways["transformers"] = timed(theirs)
    sizes = {"new_tokens": new_tokens, "n_prompts": prompts}
    with ExitStack() as stack:
        if llama_cpp:
            own = by_llama_cpp(llama_cpp, python, tokenizer, **sizes)
            ways["llama.cpp"] = stack.enter_context(own)
        rows = measure(opened.model, ways, tokenizer, **sizes)
    cli.print_table(
        f"{run}: CPU seconds, threads: {threads}; x plain also in wall-clock",
        "prompts: kind; temperature: temperature; way: way; tokens per pass: tokens_per_step .2f; "
        "tokens/s: tokens_per_cpu_second .1f; x plain: over_plain_cpu .2f; "
        "wall: over_plain .2f; x transformers: over_transformers_cpu .2f",
        [{**row, "way": way, **row[way]} for row in rows for way in ways],
    )
    limit = memory_limit(opened.model)
    print(f"reading the weights alone: {limit:.1f} tokens/s")
    measured_on = processor() + ("" if activations == "fp32" else f", activations={activations}")
    return {
        "processor": measured_on,
        "head": {"steps": opened.step, "agreement": agreement(Path(run))},
        "rows": rows,
        "memory_limit": limit,
    }


main = cli.program(pretrained_heads)

if __name__ == "__main__":
    main()

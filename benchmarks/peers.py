"""An optimizer step of this project next to those of transformers and litgpt, at the same shapes.

    python -m benchmarks.peers --cpu-time

All have 4 Llama blocks (256 wide, 8 heads, SwiGLU of 704), a head tied to the embedding, fp32,
AdamW, clipping, and random tokens of 8 x 256. transformers' two prediction modules (D = 2) are made
of its own layers; litgpt has none. Each side has a process of its own; they take turns, and the
ratio is that of the medians. The others are installed into environments of their own
(``--environment``), with this one's PyTorch; what cannot be installed is left out and named.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import cli, harness
from benchmarks.harness import Row

AIM = 1.15
WIDTH, LAYERS, HEADS, INNER, BATCH, LENGTH = 256, 4, 8, 704, 8, 256


def our_step(task: Row) -> tuple[Callable[[], Any], Any]:
    """This project's optimizer step, and its model."""
    from benchmarks.workloads import build_step, prepare_process

    prepare_process()
    sizes = {"n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": HEADS, "d_ff": INNER}
    shape = {"model": "micro", "batch_size": BATCH, "seq_len": LENGTH}
    overrides = [f"model.{name}={value}" for name, value in sizes.items()]
    built = build_step({**task, **shape, "overrides": overrides})
    return built.step, built.model


def transformers_step(task: Row) -> tuple[Callable[[], Any], Any]:
    """The same of ``LlamaForCausalLM``, with prediction modules made of its layers."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama as llama

    config = LlamaConfig(
        vocab_size=task["vocab_size"],
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )

    class Module(nn.Module):
        def __init__(self, layer: int) -> None:
            super().__init__()
            self.norms = nn.ModuleList(llama.LlamaRMSNorm(WIDTH) for _ in range(3))
            self.eh_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)
            self.block = llama.LlamaDecoderLayer(config, layer)

        def forward(self, embedded: Any, hidden: Any, angles: Any) -> Any:
            both = torch.cat((self.norms[0](embedded), self.norms[1](hidden)), dim=-1)
            return self.norms[2](self.block(self.eh_proj(both), position_embeddings=angles))

    model = LlamaForCausalLM(config)
    depth = task["depth"]
    model.modules_ahead = nn.ModuleList(Module(LAYERS + k) for k in range(depth))
    tokens = random_tokens(task, depth)

    def loss() -> Any:
        hidden = model.model(tokens[:, :LENGTH]).last_hidden_state
        angles = model.model.rotary_emb(hidden, torch.arange(LENGTH).unsqueeze(0))
        total = 0.0
        for k, weight in enumerate([1.0, *[0.15] * depth]):
            if k:
                embedded = model.model.embed_tokens(tokens[:, k : LENGTH + k])
                hidden = model.modules_ahead[k - 1](embedded, hidden, angles)
            targets = tokens[:, k + 1 : LENGTH + k + 1].flatten()
            total += weight * F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets)
        return total

    return bare_step(model, loss), model


def litgpt_step(task: Row) -> tuple[Callable[[], Any], Any]:
    """The same of litgpt's ``GPT``, with its own chunked cross-entropy."""
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    model = GPT(
        Config(
            n_layer=LAYERS,
            n_head=HEADS,
            n_embd=WIDTH,
            intermediate_size=INNER,
            block_size=LENGTH,
            vocab_size=task["vocab_size"],
            padded_vocab_size=task["vocab_size"],
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )
    model.lm_head.weight = model.transformer.wte.weight
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    tokens = random_tokens(task, 0)

    def loss() -> Any:
        return chunked_cross_entropy(model(tokens[:, :LENGTH]), tokens[:, 1:])

    return bare_step(model, loss), model


def random_tokens(task: Row, depth: int) -> Any:
    """Token ids [B, T + D + 1]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(task["vocab_size"], (BATCH, LENGTH + depth + 1), generator=generator)


def bare_step(model: Any, loss: Callable[[], Any]) -> Callable[[], Any]:
    """An optimizer step with AdamW and clipping."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> Any:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


STEPS = {"ours": our_step, "transformers": transformers_step, "litgpt": litgpt_step}


def training(task: Row) -> Iterator[Row]:
    """Some steps a turn of ``side``: seconds of one step, and peak memory in bytes."""
    import torch

    from benchmarks.workloads import WARMUP_STEPS, timed_steps

    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    step, model = STEPS[task["side"]](task)
    losses = [float(step()) for _ in range(WARMUP_STEPS)]
    yield {"loss": losses[0], "parameters": sum(p.numel() for p in model.parameters())}
    yield from timed_steps(step, task)


def install(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Install the other libraries, each into an environment below ``folder``.

    Their requirements contradict each other, so they cannot share one.

    Returns:
        Name -> Python; and what could not be installed, with the reason.
    """
    import torch

    pythons, lacks = {}, []
    pinned = f"torch=={torch.__version__.partition('+')[0]}"
    for name in ("transformers", "litgpt"):
        python = folder / name / "bin" / "python"
        if not any((folder / name).glob(f"lib/*/site-packages/{name}/__init__.py")):
            harness.progress(f"installing {name} into {folder / name}")
            venv.create(folder / name, with_pip=True)
            command = [str(python), "-m", "pip", "install", "-q", pinned, name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lacks.append(f"{name}: {done.stderr.strip().splitlines()[-1]}")
                continue
        pythons[name] = str(python)
    return pythons, lacks


def compare_steps(answers: Mapping[str, list[Row]]) -> Row:
    """A row: the medians of every side, and the ratio of the best other side to ours."""
    row: Row = {}
    for name, own in answers.items():
        seconds = median(answer["seconds"] for answer in own)
        row[f"{name}_ms"] = seconds * 1e3
        row[f"{name}_tokens_per_second"] = BATCH * LENGTH / seconds
        row[f"{name}_peak_mb"] = own[-1]["rss"] / 1e6
        row |= {f"{name}_{key}": own[-1][key] for key in ("loss", "parameters")}
    others = [row[f"{name}_ms"] for name in answers if name != "ours"]
    row["times_the_best"] = min(others) / row["ours_ms"] if others else None
    return row


@cli.command(quick={"turns": 2}, cpu_time=True)
def peers(
    vocab_sizes: Sequence[int] = (4096, 32768),
    depths: Sequence[int] = (0, 2),
    steps: int = 2,
    turns: int = 7,
    threads: int = 1,
    environment: Path = Path("runs/peers"),
) -> Row:
    """An optimizer step next to transformers' and litgpt's.

    Args:
        steps: steps a turn.
        environment: folder of the others' environments.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    others, lacks = install(environment.resolve())
    pythons = {"ours": sys.executable, **others}
    rows = []
    for vocab_size, depth in itertools.product(vocab_sizes, depths):
        shape = {"vocab_size": vocab_size, "depth": depth}
        task = {**shape, "threads": threads, "steps": steps}
        sides = {
            name: partial(harness.Worker, training, {**task, "side": name}, python=python)
            for name, python in pythons.items()
            if depth == 0 or name != "litgpt"
        }
        found = harness.race(sides, turns, say=f"V={vocab_size} D={depth}")
        rows.append({**shape, **compare_steps(found)})
    each = (f"{name}, ms: {name}_ms .0f; {name}, MB: {name}_peak_mb .0f; " for name in pythons)
    cli.print_table(
        f"A step of {LAYERS} x {WIDTH}, batch {BATCH} x {LENGTH}",
        f"V: vocab_size ,; D: depth; {''.join(each)}"
        f"tokens/s, times the best (aim {AIM}): times_the_best .2f",
        rows,
    )
    for line in lacks:
        print(f"left out: {line}")
    return {"aim": AIM, "left_out": lacks, "rows": rows}


main = cli.program(peers)

if __name__ == "__main__":
    main()

"""An optimizer step of this project beside those of transformers and litgpt, at the same shapes.

Run ``python -m benchmarks.peers --cpu-time``. The others are installed into environments of their
own (``--environment``), with this one's PyTorch; what cannot be installed is left out, and said.
All have 4 Llama blocks (256 wide, 8 heads, SwiGLU of 704), a head that is the embedding, fp32,
AdamW, clipping, and random tokens of 8 x 256. Two prediction modules (D = 2) are put together of
transformers' own layers there; litgpt has none. Every model has a process of its own, and they
take turns, some steps each: the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import common

MODULE = "benchmarks.peers"
AIM = 1.15
WIDTH, LAYERS, HEADS, INNER, BATCH, LENGTH = 256, 4, 8, 704, 8, 256
_WARMUP_STEPS = 2


def our_step(task: dict[str, Any]) -> tuple[Callable[[], Any], Any]:
    """This project's optimizer step, and its model."""
    from benchmarks.train_step import build_step
    from mtp_lightning.runtime import keep_freed_memory

    keep_freed_memory()  # as the apps do
    sizes = {"n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": HEADS, "d_ff": INNER}
    shape = {"model": "micro", "batch_size": BATCH, "seq_len": LENGTH}
    overrides = [f"model.{name}={value}" for name, value in sizes.items()]
    step, model, _ = build_step({**task, **shape, "overrides": overrides})
    return step, model


def transformers_step(task: dict[str, Any]) -> tuple[Callable[[], Any], Any]:
    """The same of ``LlamaForCausalLM``; its prediction modules are put together here."""
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
        inputs = tokens[:, :LENGTH]
        hidden = model.model(inputs).last_hidden_state
        angles = model.model.rotary_emb(hidden, torch.arange(LENGTH).unsqueeze(0))
        total = F.cross_entropy(
            model.lm_head(hidden).flatten(0, 1), tokens[:, 1 : LENGTH + 1].flatten()
        )
        for k, module in enumerate(model.modules_ahead, start=1):
            embedded = model.model.embed_tokens(tokens[:, k : LENGTH + k])
            hidden = module(embedded, hidden, angles)
            targets = tokens[:, k + 1 : LENGTH + k + 1].flatten()
            total = total + 0.15 * F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets)
        return total

    return bare_step(model, loss), model


def litgpt_step(task: dict[str, Any]) -> tuple[Callable[[], Any], Any]:
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


def random_tokens(task: dict[str, Any], depth: int) -> Any:
    """[B, T + D + 1]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(task["vocab_size"], (BATCH, LENGTH + depth + 1), generator=generator)


def bare_step(model: Any, loss: Callable[[], Any]) -> Callable[[], Any]:
    """An optimizer step as PyTorch has it."""
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


SIDES = {"ours": our_step, "transformers": transformers_step, "litgpt": litgpt_step}


def work(task: dict[str, Any]) -> None:
    """A side's process: for every line on stdin some steps, and a line on stdout about them."""
    import torch

    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    step, model = SIDES[task["side"]](task)
    losses = [float(step()) for _ in range(_WARMUP_STEPS)]
    parameters = sum(p.numel() for p in model.parameters())
    common.answer_parent({"loss": losses[0], "parameters": parameters})
    for line in sys.stdin:
        began = common.clock()
        for _ in range(int(line)):
            step()
        seconds = (common.clock() - began) / int(line)
        common.answer_parent({"seconds": seconds, "rss_peak": common.peak_rss()})


class Side:
    """What the parent has of such a process."""

    def __init__(self, python: str, task: dict[str, Any]) -> None:
        self._command = [python, "-m", MODULE, "--worker", json.dumps(task)]
        self._process = subprocess.Popen(
            self._command, cwd=common.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.name = task["side"]
        self.first = self.answer()

    def answer(self) -> dict[str, Any]:
        """Its next line.

        Raises:
            RuntimeError: it ended; its reasons stand on stderr.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(common._RESULT):
                found: dict[str, Any] = json.loads(line.removeprefix(common._RESULT))
                return found
        raise RuntimeError(f"{' '.join(self._command)} ended: {self._process.wait()}.")

    def turn(self, steps: int) -> dict[str, Any]:
        """Some steps."""
        assert self._process.stdin is not None
        print(steps, file=self._process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def prepare(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The Python of every other side, each in an environment of its own below ``folder``, since
    they ask for different versions of the same packages; and what is left out and why."""
    import torch

    pythons, lacks = {}, []
    pinned = f"torch=={torch.__version__.partition('+')[0]}"
    for name in ("transformers", "litgpt"):
        python = folder / name / "bin" / "python"
        if not any((folder / name).glob(f"lib/*/site-packages/{name}/__init__.py")):
            common.progress(f"installing {name} into {folder / name}")
            venv.create(folder / name, with_pip=True)
            install = [str(python), "-m", "pip", "install", "-q", pinned, name]
            done = subprocess.run(install, capture_output=True, text=True)
            if done.returncode:
                lacks.append(f"{name}: {done.stderr.strip().splitlines()[-1]}")
                continue
        pythons[name] = str(python)
    return pythons, lacks


@contextlib.contextmanager
def started(pythons: dict[str, str], task: dict[str, Any]) -> Iterator[list[Side]]:
    """The processes of one row."""
    sides = [Side(python, {**task, "side": name}) for name, python in pythons.items()]
    try:
        yield sides
    finally:
        for side in sides:
            side.end()


def measure(sides: list[Side], *, turns: int, steps: int) -> dict[str, Any]:
    """One row: medians of every side's turns, and ratios to ours."""
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for _ in range(turns):
        for side in sides:
            found[side.name].append(side.turn(steps))
    row: dict[str, Any] = {}
    for side in sides:
        seconds = statistics.median(answer["seconds"] for answer in found[side.name])
        row[f"{side.name}_ms"] = seconds * 1e3
        row[f"{side.name}_tokens_per_second"] = BATCH * LENGTH / seconds
        row[f"{side.name}_peak_mb"] = found[side.name][-1]["rss_peak"] / 1e6
        row |= {f"{side.name}_{key}": value for key, value in side.first.items()}
    others = [row[f"{side.name}_ms"] for side in sides if side.name != "ours"]
    row["times_the_best"] = min(others) / row["ours_ms"] if others else None
    return row


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, writes the JSON and returns it."""
    parser = common.parser("An optimizer step beside transformers' and litgpt's.", "peers")
    parser.add_argument("--vocab-sizes", type=common.whole_numbers, default=[4096, 32768])
    parser.add_argument("--depths", type=common.whole_numbers, default=[0, 2])
    parser.add_argument("--steps", type=int, default=2, help="a turn")
    parser.add_argument("--turns", type=int, help="of every side; default 7, with --quick 2")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument(
        "--environment", type=Path, default=Path("runs/peers"), help="folder of the others'"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    common.add_cpu_time(parser)
    options = parser.parse_args(arguments)
    if options.worker:
        work(json.loads(options.worker))
        return {}
    if options.cpu_time:
        common.use_cpu_time()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    others, lacks = prepare(options.environment.resolve())
    pythons = {"ours": sys.executable, **others}
    rows = []
    for vocab_size in options.vocab_sizes:
        for depth in options.depths:
            common.progress(f"V={vocab_size} D={depth}")
            able = {n: python for n, python in pythons.items() if depth == 0 or n != "litgpt"}
            task = {"vocab_size": vocab_size, "depth": depth, "threads": options.threads}
            with started(able, task) as sides:
                turns = options.turns or (2 if options.quick else 7)
                row = measure(sides, turns=turns, steps=options.steps)
            rows.append({"vocab_size": vocab_size, "depth": depth, **row})
    result = {
        "benchmark": "peers",
        "aim": AIM,
        "left_out": lacks,
        "rows": rows,
        "machine": common.machine(),
    }
    columns = {"V": "vocab_size|,", "D": "depth"}
    for name in pythons:
        columns |= {f"{name}, ms": f"{name}_ms|.0f", f"{name}, MB": f"{name}_peak_mb|.0f"}
    columns[f"tokens/s, times the best (aim {AIM})"] = "times_the_best|.2f"
    common.print_table(f"A step of {LAYERS} x {WIDTH}, batch {BATCH} x {LENGTH}", columns, rows)
    for line in lacks:
        print(f"left out: {line}")
    common.write_json(result, options.output)
    return result


if __name__ == "__main__":
    main()

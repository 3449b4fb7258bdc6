"""The timed work: an optimizer step and a decoding, built by the code of this file's checkout.

``benchmarks.against`` runs :func:`training` and :func:`decoding` of two commits, each by its own
version of this file. So the tasks and answers keep their meaning from one commit to the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Row

WARMUP_STEPS = 2

# Model -> the shape of its steps: the main job's model, the tables' models, a task's (star_graph).
MODELS: dict[str, Row] = {
    "nano": {"vocab_size": 1024, "depth": 2, "batch_size": 4, "seq_len": 256},
    "micro": {"vocab_size": 4096, "depth": 2, "batch_size": 8, "seq_len": 256},
    "tiny": {"vocab_size": 4096, "depth": 2, "batch_size": 4, "seq_len": 256},
    "pico": {"vocab_size": 64, "depth": 3, "batch_size": 64, "seq_len": 24, "mtp": "parallel"},
    "deepseek_nano": {"vocab_size": 1024, "depth": 1, "batch_size": 4, "seq_len": 256},
    "deepseek_micro": {"vocab_size": 4096, "depth": 1, "batch_size": 4, "seq_len": 256},
}


@dataclass(frozen=True)
class Training:
    """An optimizer step as a run takes it, without Lightning, callbacks and logging."""

    step: Callable[[], torch.Tensor]  # takes a step and returns the loss
    # Runs the forward pass of a step; returns the bytes of the gradients of hidden states, which
    # the loss makes in its forward pass, and the loss.
    forward: Callable[[], tuple[int, torch.Tensor]]
    model: Any
    optimizer: torch.optim.Optimizer
    flops_per_token: float  # attention counts in full, without a causal discount
    rss_imported: int  # bytes of the process after all imports and before the model


def build_step(task: Row) -> Training:
    """Build an optimizer step on random tokens.

    Args:
        task: ``model``, ``depth``, ``vocab_size``, ``batch_size`` and ``seq_len``; and, if wanted,
            ``mtp`` (default ``sequential``), ``overrides`` of the config, ``device``.
    """
    from data_modules.windows import WindowBatch
    from mtp_lightning.experiment.build import build_model_config, build_objective
    from mtp_lightning.experiment.instantiate import instantiate
    from mtp_lightning.model import MTPModel
    from mtp_lightning.objective.balance.base import NoBalance
    from mtp_lightning.objective.micro_batch import micro_batch_loss
    from mtp_lightning.objective.schedule.base import Progress
    from mtp_lightning.objective.step import OptimizerStep

    depth, device = task["depth"], task.get("device", "cpu")
    cfg = harness.compose_config(
        [
            f"model={task['model']}",
            f"mtp={task.get('mtp', 'sequential')}",
            f"mtp.depth={depth}",
            f"data.seq_len={task['seq_len']}",
            f"data.batch_size={task['batch_size']}",
            "lambda_schedule=constant",
            *task.get("overrides", []),
        ]
    )
    rss_imported = harness.current_rss()
    model = MTPModel(build_model_config(cfg, task["vocab_size"]))
    model.initialize(cfg.seed)
    model.to(device)
    optimizer = instantiate(cfg.optimizer).build(model)
    one_step = OptimizerStep(
        model,
        schedule=instantiate(cfg.lambda_schedule),
        balance=NoBalance(depth),
        objective=build_objective(cfg),
        seed=cfg.seed,
        clip_norm=cfg.trainer.gradient_clip_val,
    )
    progress = Progress(step=0, max_steps=cfg.trainer.max_steps)
    mtp = model.config.mtp
    width = task["seq_len"] + mtp.stride * depth + 1 + mtp.extra_places
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(task["vocab_size"], (task["batch_size"], width), generator=generator)
    batch = WindowBatch(tokens, depth, stride=mtp.stride, extra=mtp.extra_places).to(device)

    def step() -> torch.Tensor:
        return one_step(batch, progress, optimizer).loss

    def forward() -> tuple[int, torch.Tensor]:
        plan = one_step.plan(batch, progress)
        loss, _, _ = micro_batch_loss(model, one_step.objective, plan, plan.micro_batches[0])
        d_model, element = model.config.trunk.d_model, next(model.parameters()).element_size()
        return sum(plan.counts.valid) * d_model * element, loss

    flops = one_step.cost.per_token(task["seq_len"])
    return Training(step, forward, model, optimizer, flops, rss_imported)


def training(task: Row) -> Iterator[Row]:
    """Some optimizer steps a turn: seconds of one, peak memory in bytes, the last loss.

    Args:
        task: that of :func:`build_step` and :func:`timed_steps`; with ``autocast``, products are
            computed in bf16.
    """
    prepare_process()
    built = build_step(task)
    step = built.step
    if task.get("autocast"):  # around forward and backward, as Lightning's plugin does it
        step = torch.autocast(task.get("device", "cpu"), torch.bfloat16)(step)
    losses = [float(step()) for _ in range(WARMUP_STEPS)]
    yield {"result": losses, "parameters": built.model.config.num_params()}
    yield from timed_steps(step, task)


def timed_steps(step: Callable[[], torch.Tensor], task: Row) -> Iterator[Row]:
    """The turns of :func:`training` with any step, which returns its loss. A turn takes ``steps``
    (default 1) of the task, and lasts at least its ``seconds`` (default 0)."""
    while True:
        done, began = 0, harness.clock()
        while done < task.get("steps", 1) or harness.clock() - began < task.get("seconds", 0):
            loss = step()
            done += 1
        harness.synchronize()
        seconds = (harness.clock() - began) / done
        yield {"seconds": seconds, "rss": harness.peak_rss(), "result": float(loss)}


def decoding(task: Row) -> Iterator[Row]:
    """A greedy decoding of all prompts a turn: seconds per token, memory, a hash of the ids.

    Args:
        task: ``overrides`` of the model's config, ``vocab_size``, ``depth``, ``precision``,
            ``batch``, ``prompt_tokens``, ``new_tokens``, and ``drafts``: whether it drafts.
    """
    from mtp_lightning.decoding import generate
    from mtp_lightning.decoding.precision import use_precision
    from mtp_lightning.experiment.build import build_model_config
    from mtp_lightning.model import MTPModel

    prepare_process()
    cfg = harness.compose_config([*task["overrides"], f"mtp.depth={task['depth']}"])
    model = MTPModel(build_model_config(cfg, task["vocab_size"]))
    model.initialize(0)
    model.eval()
    use_precision(model, task["precision"])
    generator = torch.Generator().manual_seed(0)
    shape = (task["batch"], task["prompt_tokens"])
    prompts = torch.randint(task["vocab_size"], shape, generator=generator).tolist()

    def decode() -> Row:
        began = harness.clock()
        found = generate(
            model, prompts, max_new_tokens=task["new_tokens"], speculative=task["drafts"]
        )
        seconds = harness.clock() - began
        said = json.dumps([generation.token_ids for generation in found])
        return {
            "seconds": seconds / (task["batch"] * task["new_tokens"]),
            "rss": harness.peak_rss(),
            "result": hashlib.sha256(said.encode()).hexdigest(),
        }

    yield {"result": decode()["result"]}
    while True:
        yield decode()


def prepare_process() -> None:
    """Keep freed memory, as the apps do, and require that this checkout's code is measured."""
    import mtp_lightning
    from mtp_lightning.runtime import keep_freed_memory

    if not Path(found := mtp_lightning.__file__ or "").is_relative_to(harness.ROOT):
        raise RuntimeError(f"{found} was imported, which is not of {harness.ROOT}")
    keep_freed_memory()

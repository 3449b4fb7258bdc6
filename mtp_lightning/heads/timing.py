"""Measures in some seconds how fast this machine is with a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from data_modules.windows import WindowBatch
from mtp_lightning.decoding import generate
from mtp_lightning.objective.cost import forward_flops
from mtp_lightning.opening import OpenedModel

# Seconds of five programs; FLOPs per weight of mtp.init=last_block (8192 tokens), and those that
# read text in the time of a quick certificate of eight prompts, which decodes token by token
# (SmolLM2, AMD EPYC, AVX2, 2026-11-30). A small model's certificate takes a minute.
_STARTS, _BEGINNING, _CERTIFICATE = 90.0, 16_000, 230_000
# Seconds of a measured call above which it is not repeated.
_LONG = 2.0


def fastest_precision(run: OpenedModel, window: int, *, on_cpu: bool) -> tuple[str, float]:
    """The precision to train in, and the FLOP/s of reading windows in it."""
    if not on_cpu:
        half = torch.cuda.is_bf16_supported(including_emulation=False)  # as `auto` chooses
        return "auto", _reading_speed(run, window, half=half)
    fp32 = _reading_speed(run, window, half=False)
    # bf16 is twice as fast as fp32 on some CPUs, and ten times slower on those without it, where
    # one window takes as long as all in fp32.
    if _reading_speed(run, window, half=True, batch=1) > fp32 / 4:
        bf16 = _reading_speed(run, window, half=True)
        return ("bf16-mixed", bf16) if bf16 > fp32 else ("32-true", fp32)
    return "32-true", fp32


def _reading_speed(run: OpenedModel, window: int, *, half: bool, batch: int = 8) -> float:
    """FLOP/s of reading ``batch`` windows, in fp32 or in bf16."""
    depth = run.model.depth
    device = run.model.head.weight.device
    tokens = torch.zeros(batch, window + depth + 1, dtype=torch.long, device=device)
    windows = WindowBatch(tokens, depth)
    flops = forward_flops(run.model.config, window) * batch

    @torch.no_grad()
    def read() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            run.model.head(run.model(windows)[0])

    return flops / _seconds(read)


def writing_speed(run: OpenedModel) -> float:
    """Tokens per second of texts that are written together."""
    n, n_new = 32, 8
    prompts: list[Any] = [[i % run.model.config.trunk.vocab_size] for i in range(n)]

    def write() -> None:
        generate(
            run.model, prompts, batch_size=n, max_new_tokens=n_new, temperature=1.0, eot_id=-1,
            speculative=False,
        )  # fmt: skip

    return n * n_new / _seconds(write)


def _seconds(work: Callable[[], None]) -> float:
    """The median of three calls after a first one, which is enough if it takes long."""

    def once() -> float:
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():  # a GPU still works when the call returns
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = once()
    if first > _LONG:  # start-up is a small part of it
        return first
    return median(once() for _ in range(3))


def other_seconds(weights: int, speed: float) -> float:
    """Seconds for the start of training, the certificate, the export and timing drafts."""
    return _STARTS + weights * _BEGINNING / speed + max(60.0, weights * _CERTIFICATE / speed)

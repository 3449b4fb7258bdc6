"""Tokens per second and model FLOP utilisation of the training itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

from mtp_lightning.callbacks.base import RunCallback
from mtp_lightning.settings import require_whole


class Throughput(RunCallback):
    """Logs `perf/tokens_per_second` and `perf/mfu`.

    Counted is the time of training, waiting for data included, validation and checkpoints excluded.
    The first step of a process is left out (it compiles and allocates). Values are means over the
    steps since the last log; a GPU is waited for once per log.

    `perf/mfu` = achieved training FLOP/s / (processes x matmul rate). The matmul rate is not a data
    sheet's: it is measured in this process at the start of training, in the precision of the run:
    1024^3 on a CPU, 8192^3 on a GPU. FLOPs are those that the module's training step reports.

    The training step returns `tokens` (depth-0 targets of this optimizer step, all processes) and
    `flops` (of this optimizer step, all processes), both Python numbers.

    Args:
        every_n_steps: steps between two logs; null follows `trainer.log_every_n_steps`.
        measure_matmul: measure the matmul rate (about 0.3 s); without it `perf/mfu` is not logged.
    """

    def __init__(self, every_n_steps: int | None = None, measure_matmul: bool = True) -> None:
        if every_n_steps is not None:
            require_whole("callbacks.throughput.every_n_steps", every_n_steps, least=1)
        self.every_n_steps = every_n_steps
        self.measure_matmul = measure_matmul
        self.matmul_rate: float | None = None
        self._tokens_per_second: float | None = None  # of the last window
        self._reset()

    def _reset(self) -> None:
        self._device = torch.device("cpu")
        self._processes = 1
        self._mark: float | None = None
        self._pause_began: float | None = None
        self._window = _Sum()
        self._total = _Sum()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the matmul rate before the clock starts."""
        self._reset()
        self._device = pl_module.device
        self._processes = trainer.world_size
        if self.measure_matmul:
            self.matmul_rate = measure_matmul_rate(self._device, run_dtype(str(trainer.precision)))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count this step; log at the end of a window."""
        if self._mark is None:
            self._synchronize()
            self._mark = time.perf_counter()
            return
        self._window.add(outputs["tokens"], outputs["flops"])
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every != 0 and trainer.global_step != trainer.max_steps:
            return
        values = self._close_window().values(self.matmul_rate, self._processes)
        self._tokens_per_second = values["perf/tokens_per_second"]
        for name, value in values.items():
            pl_module.log(name, value, on_step=True, on_epoch=False, rank_zero_only=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock again."""
        self._go_on()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the last, unfinished window."""
        self._close_window()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training, such as writing a checkpoint."""
        self._pause()
        try:
            yield
        finally:
            self._go_on()

    def shown(self) -> str:
        """Tokens per second of the last window."""
        return f"{_short(self._tokens_per_second)} tok/s" if self._tokens_per_second else ""

    def summary(self) -> dict[str, float]:
        """Means over everything trained in this process; empty after fewer than two steps."""
        return (
            self._total.values(self.matmul_rate, self._processes) if self._total.seconds > 0 else {}
        )

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _pause(self) -> None:
        if self._mark is not None and self._pause_began is None:
            self._synchronize()
            self._pause_began = time.perf_counter()

    def _go_on(self) -> None:
        if self._mark is not None and self._pause_began is not None:
            self._synchronize()
            self._mark += time.perf_counter() - self._pause_began  # as if the pause had not been
            self._pause_began = None

    def _close_window(self) -> _Sum:
        """The finished window, added to the total; a new one begins."""
        window, self._window = self._window, _Sum()
        if self._mark is None or window.steps == 0:
            return window
        self._synchronize()
        now = time.perf_counter()
        window.seconds, self._mark = now - self._mark, now
        self._total = self._total.plus(window)
        return window


class _Sum:
    """What a stretch of training did."""

    def __init__(self) -> None:
        self.steps = 0
        self.tokens = 0.0
        self.flops = 0.0
        self.seconds = 0.0

    def add(self, tokens: float, flops: float | None) -> None:
        self.steps += 1
        self.tokens += float(tokens)
        self.flops += float(flops or 0.0)

    def plus(self, other: _Sum) -> _Sum:
        result = _Sum()
        for name in vars(result):
            setattr(result, name, getattr(self, name) + getattr(other, name))
        return result

    def values(self, matmul_rate: float | None, processes: int) -> dict[str, float]:
        result = {"perf/tokens_per_second": self.tokens / self.seconds}
        if matmul_rate and self.flops:
            result["perf/mfu"] = self.flops / self.seconds / (matmul_rate * processes)
        return result


def _short(rate: float) -> str:
    """12345 -> 12.3k"""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g}{letter}"
    return f"{rate:.3g}"


def run_dtype(precision: str) -> torch.dtype:
    """The dtype that a run of Lightning's `trainer.precision` multiplies in."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32


def measure_matmul_rate(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    seconds: float = 0.3,
) -> float:
    """FLOP/s of `size`^3 matrix products (1024 on a CPU, 8192 on a GPU), the fastest of those that
    fit in `seconds` (at least 3): the fastest is what the machine can do, and a busy neighbour does
    not lower it."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    with torch.no_grad():
        once()  # allocates and picks kernels
        began = time.perf_counter()
        times = [once() for _ in range(3)]
        while time.perf_counter() - began < seconds:
            times.append(once())
    return 2.0 * size**3 / min(times)

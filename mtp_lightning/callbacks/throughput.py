"""Tokens per second and model FLOP utilization of training, and a warning on a shared machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from mtp_lightning.callbacks.base import RunCallback
from mtp_lightning.callbacks.device_rate import measure_matmul_rate, peak_of, run_dtype

log = logging.getLogger(__name__)

# Seconds of products per validation, and the ratio of two measured rates from which times and
# speeds of a run are no longer reliable.
_AGAIN, _DRIFT = 0.05, 2.0


@dataclass(eq=False)
class Throughput(RunCallback):
    """Logs `perf/tokens_per_second`, `perf/mfu` and `perf/of_matmul`.

    The clock counts training, including the wait for data, without validation and checkpoints. A
    process's first step is left out, since it compiles and allocates. Values are means over the
    steps since the last log; a GPU is waited for once per log.

    `perf/mfu` is the training's FLOP/s over the devices' published peak for dense products in the
    run's precision, if it is known: on GPUs. `perf/of_matmul` is the same over the rate of a plain
    matrix product in this process, measured at the start of training: 1024^3 on a CPU, 8192^3 on a
    GPU. That rate is below the peak, so the ratio is larger. FLOPs are those that the module's
    training step reports.

    On a CPU products are measured again at every validation. `perf/matmul_drift` in the summary is
    the largest of these rates over the smallest; from 2 on there is one warning: other processes
    use the same cores, and times and speeds of the run mean little.

    The training step returns `tokens` (depth-0 targets of this optimizer step, all processes) and
    `flops` (of this optimizer step, all processes), both Python numbers.
    """

    every_n_steps: int | None = None
    measure_matmul: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.matmul_rate: float | None = None
        self.peak: float | None = None
        self._tokens_per_second: float | None = None  # since the log before
        self._reset()

    def _reset(self) -> None:
        self._typical: list[float] = []  # rates of products, at the start and at validations
        self._mark: float | None = None  # the time up to which training is counted
        self._pause_began: float | None = None
        self._total = self._at_last_log = _Work()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures products before the clock starts."""
        self._reset()
        self._device = pl_module.device
        self._processes = trainer.world_size
        self._dtype = run_dtype(str(trainer.precision))
        self.peak = peak_of(self._device, self._dtype)
        if self.measure_matmul:
            rate = measure_matmul_rate(self._device, self._dtype)
            self.matmul_rate, self._typical = rate.fastest, [rate.typical]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        if self._mark is None:
            self._synchronize()
            self._mark = time.perf_counter()
            return
        tokens, flops, seconds = self._total
        self._total = _Work(tokens + outputs["tokens"], flops + outputs["flops"], seconds)
        interval = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % interval != 0 and trainer.global_step != trainer.max_steps:
            return
        self._count_time()
        values, self._at_last_log = self._rates_since(self._at_last_log), self._total
        self._tokens_per_second = values["perf/tokens_per_second"]
        for name, value in values.items():
            pl_module.log(name, value, on_step=True, on_epoch=False, rank_zero_only=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock, and measures whether the machine has become slower."""
        self._pause()
        if self._typical and self._device.type == "cpu":
            self._measure_again(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._go_on()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count_time()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out time that is not training, such as writing a checkpoint."""
        self._pause()
        try:
            yield
        finally:
            self._go_on()

    def shown(self) -> str:
        return f"{_short(self._tokens_per_second)} tok/s" if self._tokens_per_second else ""

    def summary(self) -> dict[str, float]:
        """Means over all training of this process; empty after fewer than two steps."""
        if self._total.seconds <= 0:
            return {}
        values = self._rates_since(_Work())
        return values | ({"perf/matmul_drift": self._drift} if len(self._typical) > 1 else {})

    def _rates_since(self, earlier: _Work) -> dict[str, float]:
        tokens, flops, seconds = (a - b for a, b in zip(self._total, earlier, strict=True))
        values = {"perf/tokens_per_second": tokens / seconds}
        for tag, rate in (("perf/mfu", self.peak), ("perf/of_matmul", self.matmul_rate)):
            if rate:
                values[tag] = flops / seconds / self._processes / rate
        return values

    @property
    def _drift(self) -> float:
        return max(self._typical) / min(self._typical)

    def _measure_again(self, trainer: pl.Trainer) -> None:
        before = self._drift
        rate = measure_matmul_rate(self._device, self._dtype, seconds=_AGAIN)
        self._typical.append(rate.typical)
        if before < _DRIFT <= self._drift and trainer.is_global_zero:
            log.warning(
                "Matrix products have run %.1f times as fast at one point of this run as at "
                "another (noticed at step %d): other processes use its cores. Losses are not "
                "affected, but times and speeds do not compare with those of other runs.",
                self._drift,
                trainer.global_step,
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
            self._mark += time.perf_counter() - self._pause_began  # leaves the pause out
            self._pause_began = None

    def _count_time(self) -> None:
        """Adds the time since the mark to the training done, and moves the mark."""
        if self._mark is not None and self._total.tokens > self._at_last_log.tokens:
            self._synchronize()
            now = time.perf_counter()
            self._total = self._total._replace(seconds=self._total.seconds + now - self._mark)
            self._mark = now


class _Work(NamedTuple):
    """Training of this process up to a step."""

    tokens: float = 0
    flops: float = 0
    seconds: float = 0.0


def _short(rate: float) -> str:
    """12345 -> 12.3k"""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g}{letter}"
    return f"{rate:.3g}"

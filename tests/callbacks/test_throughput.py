"""Tokens per second and MFU against a clock that the test turns."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tiny_run import TinyModule, fit

from mtp_lightning.callbacks import throughput as module_under_test
from mtp_lightning.callbacks.checkpoints import Checkpoints
from mtp_lightning.callbacks.throughput import Throughput, measure_matmul_rate, run_dtype
from mtp_lightning.loggers.csv import MetricsCSV
from mtp_lightning.run.metrics import read_metrics


class Clock:
    """Time passes only where the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module_under_test, "time", clock)
    monkeypatch.setattr(module_under_test, "measure_matmul_rate", lambda *_args: 1e7)
    return clock


class Slow(TinyModule):
    """Steps take 0.5 s (the first one 50 s: it compiles), a validation batch 7 s."""

    clock: Clock

    def training_step(self, batch, batch_idx):
        self.clock.now += 0.5 if self.global_step else 50.0
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx) -> None:
        self.clock.now += 7.0
        super().validation_step(batch, batch_idx)


class SlowSave(Checkpoints):
    """A checkpoint takes 3 s."""

    clock: Clock

    def setup(self, trainer, pl_module, stage) -> None:
        save = trainer.save_checkpoint

        def slow(*args, **kwargs) -> None:
            self.clock.now += 3.0
            save(*args, **kwargs)

        trainer.save_checkpoint = slow


def test_only_training_time_counts(tmp_path: Path, clock: Clock) -> None:
    module, save = Slow(), SlowSave(tmp_path / "c", every_n_steps=3)
    module.clock = save.clock = clock
    throughput = Throughput(every_n_steps=2)
    fit(module, [save, throughput], max_steps=11, loggers=[MetricsCSV(tmp_path)])
    assert clock.now > 100 + 50 + 9 * 7  # validations did take their time
    # 100 tokens and 1e6 FLOPs in 0.5 s; the machine does 1e7 FLOP/s
    expected = {"perf/tokens_per_second": 200.0, "perf/mfu": 0.2}
    assert throughput.summary() == pytest.approx(expected)
    assert throughput.shown() == "200 tok/s"
    rows = read_metrics(tmp_path / "metrics.csv")
    assert "perf/mfu" not in rows[0], "the first step is not measured"
    for row in rows[1:]:
        assert {tag: row[tag] for tag in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (None, ""),
        (12.3, "12.3 tok/s"),
        (12345, "12.3k tok/s"),
        (2.5e6, "2.5M tok/s"),
        (3e9, "3G tok/s"),
    ],
)
def test_what_the_progress_bar_shows(rate: float | None, text: str) -> None:
    throughput = Throughput()
    throughput._tokens_per_second = rate
    assert throughput.shown() == text


def test_a_run_of_one_step_has_no_rate(clock: Clock) -> None:
    module = Slow()
    module.clock = clock
    throughput = Throughput()
    fit(module, [throughput], max_steps=1)
    assert throughput.summary() == {}


def test_the_matmul_rate_is_that_of_a_plain_product() -> None:
    device = torch.device("cpu")
    rate = measure_matmul_rate(device, size=256, seconds=0.1)
    a = torch.randn(256, 256)
    times = []
    for _ in range(30):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    assert 0.2 < rate / (2 * 256**3 / min(times)) < 5


def test_the_dtype_follows_the_precision() -> None:
    names = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    assert {name: run_dtype(name) for name in names} == names


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="every_n_steps"):
        Throughput(every_n_steps=0)

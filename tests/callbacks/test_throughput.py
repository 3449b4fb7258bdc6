"""Tokens per second, MFU and a crowded machine against a clock that the test sets."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tiny_run import TinyModule, fit

from mtp_lightning.callbacks import throughput as module_under_test
from mtp_lightning.callbacks.checkpoints import Checkpoints
from mtp_lightning.callbacks.device_rate import (
    MatmulRate,
    measure_matmul_rate,
    published_peak,
    run_dtype,
)
from mtp_lightning.callbacks.throughput import Throughput
from mtp_lightning.loggers.csv import MetricsCSV
from mtp_lightning.run.metrics import read_metrics


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module_under_test, "time", clock)
    monkeypatch.setattr(module_under_test, "measure_matmul_rate", rates(1e7))
    return clock


def rates(fastest: float, *typical: float):
    """A stand-in for ``measure_matmul_rate`` that returns these medians in turn, then the last."""
    remaining = list(typical or [fastest])

    def measure(*_args, **_settings) -> MatmulRate:
        return MatmulRate(
            fastest=fastest, typical=remaining.pop(0) if len(remaining) > 1 else remaining[0]
        )

    return measure


class Slow(TinyModule):
    """Steps take 0.5 s (the first one 50 s: it compiles), a validation batch 7 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

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
    save, throughput = SlowSave(tmp_path / "c", every_n_steps=3), Throughput(every_n_steps=2)
    save.clock = clock
    fit(Slow(clock), [save, throughput], max_steps=11, loggers=[MetricsCSV(tmp_path)])
    assert clock.now > 100 + 50 + 9 * 7  # validations took time
    # 100 tokens and 1e6 FLOPs in 0.5 s; the machine does 1e7 FLOP/s
    expected = {"perf/tokens_per_second": 200.0, "perf/of_matmul": 0.2}
    assert throughput.summary() == pytest.approx({**expected, "perf/matmul_drift": 1.0})
    assert throughput.shown() == "200 tok/s"
    rows = read_metrics(tmp_path / "metrics.csv")
    assert "perf/of_matmul" not in rows[0], "the first step is not measured"
    assert not any("perf/mfu" in row for row in rows), "a CPU has no published peak"
    for row in rows[1:]:
        assert {tag: row[tag] for tag in expected} == pytest.approx(expected, rel=1e-5)


def test_mfu_is_a_share_of_the_published_peak(monkeypatch, clock: Clock) -> None:
    monkeypatch.setattr(module_under_test, "peak_of", lambda device, dtype: 4e7)
    throughput = Throughput(every_n_steps=2)
    fit(Slow(clock), [throughput], max_steps=5)
    summary = throughput.summary()
    assert summary["perf/mfu"] == pytest.approx(0.05)
    assert summary["perf/of_matmul"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("typical", "drift", "warnings"),
    [
        ((1e7, 6e6, 1.1e7), 1.1e7 / 6e6, 0),
        ((1e7, 4e6, 2e6), 5.0, 1),
        ((4e6, 1e7), 2.5, 1),  # other processes ran at the start
    ],
)
def test_a_crowded_machine_warns_once(monkeypatch, caplog, clock, typical, drift, warnings):
    monkeypatch.setattr(module_under_test, "measure_matmul_rate", rates(1e7, *typical))
    throughput = Throughput(every_n_steps=2)
    fit(Slow(clock), [throughput], max_steps=11)
    assert throughput.summary()["perf/matmul_drift"] == pytest.approx(drift)
    assert caplog.text.count("other processes use its cores") == warnings


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312.0),
        ("NVIDIA A100-PCIE-40GB", torch.float32, True, 156.0),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.4),
        ("NVIDIA H100 PCIe", torch.float16, False, 756.0),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, False, 165.2),
        ("NVIDIA H200 NVL", torch.bfloat16, False, 835.5),
        ("Tesla T4", torch.float16, False, 65.0),
        ("Tesla T4", torch.bfloat16, False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, False, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, False, None),
        ("A device of next year", torch.bfloat16, False, None),
    ],
)
def test_published_peaks_are_found_by_name_and_dtype(name, dtype, tf32, tera):
    assert published_peak(name, dtype, tf32=tf32) == (None if tera is None else tera * 1e12)


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
def test_the_progress_bar_shows_tokens_per_second(rate: float | None, text: str) -> None:
    throughput = Throughput()
    throughput._tokens_per_second = rate
    assert throughput.shown() == text


def test_a_run_of_one_step_has_no_rate(clock: Clock) -> None:
    throughput = Throughput()
    fit(Slow(clock), [throughput], max_steps=1)
    assert throughput.summary() == {}


def test_the_matmul_rate_is_near_that_of_a_plain_product() -> None:
    device = torch.device("cpu")
    state = torch.get_rng_state()
    measured = measure_matmul_rate(device, torch.float32, seconds=0.1)
    assert torch.equal(state, torch.get_rng_state()), "the run's random numbers are its own"
    assert measured.typical <= measured.fastest
    a = torch.randn(1024, 1024)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    assert 0.2 < measured.fastest / (2 * 1024**3 / min(times)) < 5


def test_the_dtype_follows_the_precision() -> None:
    names = {
        "32-true": torch.float32,
        "64-true": torch.float64,
        "bf16-mixed": torch.bfloat16,
        "16-mixed": torch.float16,
    }
    assert {name: run_dtype(name) for name in names} == names

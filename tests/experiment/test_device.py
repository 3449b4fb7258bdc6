"""The precision and compilation that a run chooses for its device."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from mtp_lightning.experiment import device
from mtp_lightning.nn import ops
from mtp_lightning.opening import open_model
from tests.integration.conftest import cache, finished, once
from tests.integration.helpers import evaluated, train_here

__all__ = ["cache", "finished", "once"]


def config(**trainer: object) -> DictConfig:
    defaults = {"accelerator": "auto", "precision": "auto", "compile": "auto"}
    return OmegaConf.create({"trainer": {**defaults, **trainer}})


def resolved(**trainer: object) -> tuple[object, ...]:
    cfg = config(**trainer)
    result = device.resolve_auto(cfg).trainer
    assert cfg == config(**trainer)  # unchanged
    return result.accelerator, result.precision, result.compile


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize(
    ("major", "precision"), [(9, "bf16-mixed"), (8, "bf16-mixed"), (7, "32-true")]
)
def test_auto_on_a_gpu_is_bf16_and_compiled(monkeypatch, compiler, major, precision):
    """An older GPU emulates bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(shutil, "which", lambda name: name if compiler else None)
    assert resolved() == ("cuda", precision, compiler)
    assert resolved(accelerator="cpu") == ("cpu", "32-true", False)
    assert resolved(precision="32-true", compile=False) == ("cuda", "32-true", False)


def test_auto_on_a_cpu_is_fp32_and_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolved() == ("cpu", "32-true", False)
    assert resolved(precision="bf16-mixed", compile=True) == ("cpu", "bf16-mixed", True)
    with pytest.raises(ValueError, match="no CUDA device"):
        resolved(accelerator="cuda")


def test_a_run_stores_the_chosen_precision(finished: Path) -> None:
    trainer = open_model(finished).run_config["trainer"]
    assert (trainer["precision"], trainer["compile"]) == ("32-true", False)


@pytest.mark.parametrize(
    ("accelerator", "precision", "expected"),
    [
        ("cuda", "bf16-mixed", "high"),
        ("cuda", "32-true", "highest"),
        ("cpu", "bf16-mixed", "highest"),
    ],
)
def test_tf32_goes_with_bf16_on_a_gpu(accelerator: str, precision: str, expected: str) -> None:
    torch.set_float32_matmul_precision("medium")  # as another run in this process may have set it
    try:
        device.use_tensor_cores(config(accelerator=accelerator, precision=precision))
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_start_of_training_and_evaluate_names_the_cpu_kernels(
    tmp_path: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "code", lambda: ("pytorch", "PyTorch's operators (the reason)"))
    line = "CPU layers by PyTorch's operators (the reason), threads: 1"
    with caplog.at_level("INFO", logger="mtp_lightning.experiment"):
        train_here(tmp_path / "run", cache, {"trainer.max_steps": 1})
    assert caplog.messages.count(line) == 1
    capsys.readouterr()
    few = ("decode.n_prompts=0", "long_range=false")
    evaluated(tmp_path / "run", f"paths.cache_dir={cache}", *few)
    assert capsys.readouterr().out.startswith(f"{line}\n")
    assert device.kernels_line("cuda") is None
    monkeypatch.setenv("MTP_LIGHTNING_QUIET", "1")
    assert device.kernels_line("cpu") is None

"""A run's settings that depend on its device: precision, and whether blocks are compiled."""

from __future__ import annotations

import os
import shutil

import torch
from omegaconf import DictConfig

from mtp_lightning.command_line.shell import QUIET
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.config import MTPConfig
from mtp_lightning.nn import ops
from mtp_lightning.runtime import pick_accelerator

AUTO = "auto"
# Precisions that compute matrix products in bf16, under autocast.
MIXED = ("bf16-mixed", "bf16-true")


def resolve_auto(cfg: DictConfig) -> DictConfig:
    """Replace every ``auto`` of the config with the device's choice, so that the stored config says
    how the run was computed.

    A CUDA device computes in bf16-mixed if it has bf16 instructions, else in fp32, and with
    compiled blocks if a C compiler is installed. A CPU computes in fp32, without compiling.

    Raises:
        UserError: the accelerator is not available.
    """
    cfg = cfg.copy()
    trainer = cfg.trainer
    trainer.accelerator = pick_accelerator(trainer.accelerator)
    gpu = trainer.accelerator == "cuda"
    if trainer.precision == AUTO:
        # GPUs before Ampere, such as the T4, emulate bf16, which is slower than fp32.
        bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        trainer.precision = "bf16-mixed" if bf16 else "32-true"
    if trainer.compile == AUTO:
        # Launching its GPU kernels, torch.compile needs a C compiler.
        compilers = os.environ.get("CC") or "cc", "gcc", "clang"
        trainer.compile = gpu and any(shutil.which(name) for name in compilers)
    return cfg


def holds_in_bf16(trainer: DictConfig, mtp: MTPConfig) -> bool:
    """Whether the trunk's matrices are stored in bf16.

    Raises:
        UserError: ``trainer.precision=bf16-true`` with a trunk that is trained or sharded.
    """
    if trainer.precision != "bf16-true":
        return False
    if mtp.trains_trunk:
        raise UserError(
            "trainer.precision=bf16-true holds a frozen trunk in bf16, and this run trains its "
            f"trunk, whose steps would be lost in rounding: {mtp.how_to_freeze}, or "
            "trainer.precision=bf16-mixed."
        )
    if trainer.strategy == "fsdp":
        raise UserError(
            "trainer.precision=bf16-true does not work with trainer.strategy=fsdp, which shards "
            "parameters of one dtype: set trainer.precision=bf16-mixed."
        )
    return True


def kernels_line(device: str) -> str | None:
    """One line about the CPU code that computes the layers and its threads; None on a GPU and with
    ``--quiet``."""
    shown = device == "cpu" and os.environ.get(QUIET) != "1"
    return f"CPU layers by {ops.code()[1]}, threads: {torch.get_num_threads()}" if shown else None


def use_tensor_cores(cfg: DictConfig) -> None:
    """Let a mixed-precision run on a GPU use TF32 for its remaining fp32 products: the routers'
    affinities, and the head at validations. ``trainer.precision=32-true`` keeps full fp32."""
    mixed = cfg.trainer.accelerator == "cuda" and cfg.trainer.precision in MIXED
    torch.set_float32_matmul_precision("high" if mixed else "highest")

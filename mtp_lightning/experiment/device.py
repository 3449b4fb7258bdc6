"""What a run does by default on the device that it finds: precision, and compiled blocks."""

from __future__ import annotations

import os
import shutil

import torch
from omegaconf import DictConfig

from mtp_lightning.cli import QUIET
from mtp_lightning.errors import UserError
from mtp_lightning.nn import ops
from mtp_lightning.runtime import pick_accelerator
from mtp_lightning.settings import require

AUTO = "auto"
# Precisions whose products are of bf16, under autocast.
MIXED = ("bf16-mixed", "bf16-true")


def settle_device(cfg: DictConfig) -> DictConfig:
    """The config with the device's own choice in the place of every ``auto``, so that what is
    stored says how a run was computed.

    On a CUDA device the precision is bf16-mixed, and blocks are compiled if there is the C compiler
    that this takes; on a CPU fp32 and eager.

    Raises:
        UserError: an accelerator that is not there, or a compile that is neither.
    """
    cfg = cfg.copy()
    trainer = cfg.trainer
    known = trainer.compile in (AUTO, True, False)
    require(known, "trainer.compile", trainer.compile, "auto, true or false")
    trainer.accelerator = pick_accelerator(trainer.accelerator)
    gpu = trainer.accelerator == "cuda"
    if trainer.precision == AUTO:
        trainer.precision = "bf16-mixed" if gpu else "32-true"
    if trainer.compile == AUTO:
        trainer.compile = gpu and has_compiler()
    return cfg


def holds_in_bf16(trainer: DictConfig, *, frozen: bool) -> bool:
    """Whether the matrices of the trunk are held in bf16.

    Args:
        trainer: the group of the config.
        frozen: whether the trunk stays as it is.

    Raises:
        UserError: ``trainer.precision=bf16-true`` of a trunk that is trained, or in parts.
    """
    if trainer.precision != "bf16-true":
        return False
    if not frozen:
        raise UserError(
            "trainer.precision=bf16-true holds a frozen trunk in bf16, and this run trains its "
            "trunk, whose steps would be lost in rounding: set mtp.freeze_trunk=true, or "
            "trainer.precision=bf16-mixed."
        )
    if trainer.strategy == "fsdp":
        raise UserError(
            "trainer.precision=bf16-true with trainer.strategy=fsdp is not there: what is sharded "
            "is of one dtype; set trainer.precision=bf16-mixed."
        )
    return True


def has_compiler() -> bool:
    """Whether the C compiler is there that torch.compile calls to start its GPU kernels."""
    return any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang"))


def kernels_told(device: str) -> str | None:
    """What computes the layers, and on how many threads, in a line; None of a GPU, or where
    ``--quiet`` asks for what a program ends with alone."""
    if device != "cpu" or os.environ.get(QUIET) == "1":
        return None
    return f"CPU layers by {ops.code()[1]}, threads: {torch.get_num_threads()}"


def use_tensor_cores(cfg: DictConfig) -> None:
    """Let a mixed-precision run on a GPU round to TF32 what it multiplies in fp32: the routers'
    affinities, the head at validations. With ``trainer.precision=32-true``, fp32 is fp32."""
    mixed = cfg.trainer.accelerator == "cuda" and cfg.trainer.precision in MIXED
    torch.set_float32_matmul_precision("high" if mixed else "highest")

"""Settings of the whole process, which the apps make once: memory, device, threads, warnings."""

from __future__ import annotations

import ctypes
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn

from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_whole
from mtp_lightning.system import cores

# PyTorch's default number of threads, read before anyone changes it; PyTorch knows no quota.
_CORES = min(torch.get_num_threads(), cores())

# mallopt's parameters, from malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """On Linux with glibc, keep the memory that a training step frees for the next step.

    By default, glibc returns every large block to the system. Each step then has all its
    activations mapped and zeroed page by page again, which takes up to a third of a step on a CPU
    (``python -m benchmarks.train_step memory``).
    """
    with suppress(OSError, AttributeError):  # another system or C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_ARENA_MAX, 1)


def pick_accelerator(name: str) -> str:
    """Return the device for ``auto``, ``cpu`` or ``cuda``; ``auto`` prefers a GPU.

    Raises:
        UserError: there is no CUDA device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("accelerator=cuda, but there is no CUDA device here: use auto or cpu.")
    return name


def set_threads(n: int | None, *, processes: int = 1) -> None:
    """Limit the threads of a matrix product.

    With one thread per core, all threads wait (spinning) for the slowest, so that any other process
    that takes a core costs most of a run's speed. With one core left free, it costs almost nothing
    (``python -m benchmarks.runs threads``).

    Args:
        n: a whole number from 1 to 1024; None for all cores but one, or for OMP_NUM_THREADS if that
            is set.
        processes: processes that share this machine's cores to train one model.
    """
    if n is None:
        if "OMP_NUM_THREADS" in os.environ:
            return
        n = max(1, (_CORES - 1) // processes)
    torch.set_num_threads(require_whole("num_threads", n, least=1, most=1024))


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Let PyTorch compute on ``n`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def full_fp32() -> Iterator[None]:
    """Compute fp32 products in fp32, also on a GPU that is allowed to round them to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def quiet_lightning() -> None:
    """Silence Lightning's greetings, tips and own deprecations."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "LeafSpec.*is deprecated",
        "does not have many workers",  # a window is read in microseconds: they would not help
        "srun. command is available",  # a run need not be started by Slurm where it is installed
        "smaller than the logging interval",  # rows are logged by step, whatever an epoch has
        "sync_dist=True",  # logged rates are those of all processes
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put modules that are in training mode into eval mode for a while."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

"""Settings of the whole process, made once by the apps: memory, threads, chatter."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings

import torch

from mtp_lightning.errors import UserError
from mtp_lightning.settings import is_whole, require

# PyTorch's own choice, before anyone else's.
_CORES = torch.get_num_threads()

# mallopt's parameters, from malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let the C library keep the memory that a training step frees, for the next step.

    By default glibc gives every large block back to the system, and each step pays for having
    all its activations mapped and zeroed page by page again: up to a third of a step on a CPU
    (``python -m benchmarks.train_step memory``). Returns whether it applied (Linux with glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1))
    return all([bool(mallopt(name, value)) for name, value in settings])


def pick_accelerator(name: str) -> str:
    """``auto`` is a GPU if there is one, else the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"accelerator={name} is not supported: choose one of auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("accelerator=cuda, but there is no CUDA device here: use auto or cpu.")
    return name


def set_threads(n: int | None, *, processes: int = 1) -> None:
    """Limit the threads of a matrix product.

    One thread for every core waits, spinning, for each of them: one neighbour that takes a core
    costs most of a run's speed. With a core left free it costs next to nothing
    (``python -m benchmarks.runs threads``).

    Args:
        n: threads; None for all cores but one, or what OMP_NUM_THREADS says.
        processes: that train one model on this machine's CPU together, and share the cores.

    Raises:
        UserError: fewer than one.
    """
    if n is None:
        if "OMP_NUM_THREADS" in os.environ:
            return
        n = max(1, (_CORES - 1) // processes)
    wanted = "a whole number of at least 1, or null for all cores but one"
    require(is_whole(n) and n >= 1, "num_threads", n, wanted)
    torch.set_num_threads(n)


def quiet_lightning() -> None:
    """Keep Lightning's greetings, tips and its own deprecations out of the run's output."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    # A window is read from a memory map in microseconds: worker processes would only cost.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Where Slurm is installed, a run that it did not start is no mistake.
    warnings.filterwarnings("ignore", message=".*srun. command is available")

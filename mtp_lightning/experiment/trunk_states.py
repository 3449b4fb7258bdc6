"""A frozen trunk's hidden states for all training windows, computed once and kept on disk.

A frozen trunk computes the same states for a window in every epoch and every run, and computing
them is most of the cost of training heads.
"""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from data_modules.cache import build_once
from data_modules.digests import digest
from data_modules.seal import note
from data_modules.store_builder import progress
from data_modules.store_module import StoreDataModule
from data_modules.window_dataset import STATES
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.device import MIXED
from mtp_lightning.experiment.self_generated import trunk_digest
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.mtp.config import MTPConfig
from mtp_lightning.nn import ops

log = logging.getLogger(__name__)

_FORMAT = 1


def cache_obstacle(model: MTPModel) -> str:
    """Why the trunk's states for a window cannot be kept, with the remedy: the trunk is trained,
    the stack gives it other tokens in training, or it does not say which states it reads. Empty if
    they can."""
    mtp = model.config.mtp
    if mtp.trains_trunk:
        return (
            "data.cache_states=true keeps a frozen trunk's states, and this run trains its "
            f"trunk: {mtp.how_to_freeze}, or data.cache_states=false."
        )
    stack = type(model.mtp)
    if (stack.through_trunk, stack.tokens_read) != (MTPStack.through_trunk, MTPStack.tokens_read):
        return (
            f"data.cache_states=true has no meaning for mtp={mtp.variant}, which gives the trunk "
            "other tokens in training: set data.cache_states=false."
        )
    config = type(mtp)
    # Another head's states would be read from the cache.
    if stack.branch is not MTPStack.branch and config.read_states is MTPConfig.read_states:
        return (
            f"data.cache_states=true needs to know which states of the trunk mtp={mtp.variant} "
            f"reads: define read_states in {config.__name__}, or set data.cache_states=false."
        )
    return ""


def keep_states(model: MTPModel, data: StoreDataModule, trainer: DictConfig) -> Path:
    """Return the folder with the trunk's states for all training windows; compute them if needed.

    The passes are those of a training step: a micro-batch of windows, in training mode, with
    gradients enabled. So the states are bit-identical to those of a training step.

    Raises:
        UserError: the states change, or the cached ones are damaged.
        OSError: the disk is full.
    """
    if reason := cache_obstacle(model):
        raise UserError(reason)
    device, precision = str(trainer.accelerator), str(trainer.precision)
    windows = data.training
    mtp = model.config.mtp
    key = digest(
        "trunk_states", _FORMAT, trunk_digest(model), data.fingerprint, data.seq_len,
        data.document_mask, data.batch_size, device, precision, ops.code()[0],
        *mtp.read_states,
        torch.get_num_threads(), torch.__version__, model.compiled,
        *(() if windows.limit is None else (windows.limit,)),
    )  # fmt: skip
    mixed = torch.autocast(device, torch.bfloat16, enabled=precision in MIXED)

    def write(folder: Path) -> None:
        bar = progress("states of the trunk", len(windows) * data.seq_len, unit=" tokens")
        content = hashlib.blake2b(digest_size=16)
        home, training = model.head.weight.device, model.training
        model.to(device).train()
        # Written in order: a full disk is an error then, which a memory map would not report.
        file = (folder / STATES).open("wb")

        def put(part: Any) -> None:
            file.write(part)
            content.update(part)

        try:
            for start in range(0, len(windows), data.batch_size):
                # The last pass is filled up with the first windows, since its size changes bits.
                numbers = np.arange(start, start + data.batch_size) % len(windows)
                with mixed:
                    batch = windows[numbers].to(device)
                    final, inputs = model.run_trunk(batch, range(1, model.depth + 1))
                branch = () if inputs.branch is final else inputs.branch.chunk(mtp.n_states, dim=-1)
                states = torch.stack([final, *branch], dim=1).cpu()
                raw = states.view(torch.uint16) if states.dtype == torch.bfloat16 else states
                if start == 0:
                    put(_header((len(windows), *raw.shape[1:]), raw.numpy().dtype))
                fresh = min(data.batch_size, len(windows) - start)
                put(raw[:fresh].numpy().data)
                bar.update(fresh * data.seq_len)
            file.flush()
            note(folder, {STATES: content.hexdigest()})
        finally:
            file.close()
            bar.close()
            model.to(home).train(training)

    folder = build_once(data.cache_dir / "trunk_states" / key, write)
    n_bytes = (folder / STATES).stat().st_size
    log.info("The trunk's states of every training window, %.2f GB, are in %s.", n_bytes / 1e9,
             folder)  # fmt: skip
    return folder


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The beginning of a ``.npy`` file."""
    descr = np.lib.format.dtype_to_descr(dtype)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return header.getvalue()

"""Decoding with packed weights only, which processes share through the cache folder.

The cache folder holds the packed weights of large models. A later process maps them into memory
instead of reading and packing the model's own files, and processes share the memory.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_modules.cache import build_once, cache_folder, cache_key
from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.blocks import dense_matrices
from mtp_lightning.cpu.packed import Kind, PackedWeight, only_copy, replace_by, replace_by_packed
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.sequential import SequentialModule
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.weight_scales import WeightScales

log = logging.getLogger(__name__)

# A model with fewer bytes is packed faster than it is looked up.
LEAST = 1 << 25
UNUSED_DAYS = 30
"""Days after which packed weights that no process has opened are removed."""
# The alignment of a weight in the file, in bytes.
_ALIGNED = 4096
_INDEX, _DATA = "index.json", "packed.bin"


class CPUWeightPacker:
    """The :class:`~mtp_lightning.weights.WeightPacker` of a model on a CPU: of the matrices that
    are only multiplied by rows, and of the embedding."""

    def __init__(self, model: MTPModel, path: Path | None, rounding: str) -> None:
        self._embedding = model.trunk.embedding
        self._folder = None if path is None else _folder(path, rounding)
        layers = list(model.modules())
        matrices = [m for x in layers if type(x) is Block for m in dense_matrices(x)]
        matrices += [x.eh_proj.weight for x in layers if type(x) is SequentialModule]
        matrices += [model.head.weight] if type(model.head) is Head else []
        ids = {id(weight) for weight in [*matrices, self._embedding.weight]}
        self._weights = {n: w for n, w in model.named_parameters() if id(w) in ids}

    def pack(self, weight: Tensor, scales: WeightScales | None = None) -> None:
        if any(weight is w for w in self._weights.values()):
            replace_by_packed(weight, scales)
            if weight is self._embedding.weight:
                self._look_up()

    def restore(self) -> frozenset[str]:
        if self._folder is None or not os.path.isdir(self._folder):  # also if it cannot be read
            return frozenset()
        try:
            packed_weights = _mapped(build_once(self._folder, _nothing), self._weights)
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            log.info("%s cannot be used and is built again: %s", self._folder, error)
            shutil.rmtree(self._folder, ignore_errors=True)
            return frozenset()
        for name, packed in packed_weights.items():
            replace_by(self._weights[name], packed)
        self._look_up()
        with suppress(OSError):  # a read-only cache
            os.utime(self._folder)
        return frozenset(packed_weights)

    def remember(self) -> None:
        copies = {name: only_copy(weight) for name, weight in self._weights.items()}
        packed = {name: copy for name, copy in copies.items() if copy is not None}
        if self._folder is None or sum(x.data.numel() for x in packed.values()) < LEAST:
            return
        try:
            # Before the new ones are written, since the disk may be too small for both.
            older = self._folder.parent.glob(self._folder.name.partition("-")[0] + "-*")
            for old in {*older, *_unused(self._folder.parent.parent)} - {self._folder}:
                shutil.rmtree(old, ignore_errors=True)
            build_once(self._folder, lambda folder: _write(folder, packed))
        except (OSError, UserError) as error:  # UserError: damaged ones that cannot be removed
            log.info("the packed weights are not kept for other processes: %s", error)

    def _look_up(self) -> None:
        """Let the embedding read its rows from the packed weight."""
        if (packed := only_copy(self._embedding.weight)) is not None:
            vars(self._embedding)["forward"] = packed.rows


def _folder(path: Path, rounding: str) -> Path:
    """The cache folder for the packed weights of a file or folder in its present state."""
    # One folder for each instruction set, since machines of several kinds may share a cache.
    kind = "_".join(["packed", native.code()[0], *rounding.split()])
    return cache_folder() / kind / cache_key(path, native.version())


def _unused(cache: Path) -> list[Path]:
    """The folders of packed weights that no process has opened for :data:`UNUSED_DAYS`."""
    limit = time.time() - UNUSED_DAYS * 86_400
    return [folder for folder in cache.glob("packed*/*") if folder.stat().st_mtime < limit]


def _nothing(folder: Path) -> None:
    raise FileNotFoundError(f"{folder} was deleted just now")


def _write(folder: Path, packed: dict[str, PackedWeight]) -> None:
    index, offset = {}, 0
    with (folder / _DATA).open("wb") as file:
        for name, weight in packed.items():
            file.write(bytes(-offset % _ALIGNED))
            offset += -offset % _ALIGNED
            index[name] = (offset, weight.outputs, weight.inputs, int(weight.kind))
            file.write(weight.data.numpy().data)
            offset += weight.data.numel()
    (folder / _INDEX).write_text(json.dumps(index), "utf-8")


def _mapped(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, PackedWeight]:
    """The packed weights of a folder, in memory that is shared with other processes.

    Raises:
        ValueError, KeyError, TypeError: the folder is not of this model.
    """
    index: dict[str, Any] = json.loads((folder / _INDEX).read_text("utf-8"))
    # Private and writable, as PyTorch asks for: nobody writes, and all read the same pages.
    file_bytes = torch.from_numpy(np.memmap(folder / _DATA, np.uint8, "c"))
    packed = {}
    for name, (offset, outputs, inputs, kind) in index.items():
        if list(weights[name].shape) != [outputs, inputs]:
            raise ValueError(f"{name} has another shape")
        size = native.lib().packed_size(outputs, inputs, Kind(kind))
        data = file_bytes[offset : offset + size]
        if offset < 0 or data.numel() != size:
            raise ValueError(f"{name} ends after the file")
        packed[name] = PackedWeight(data, outputs, inputs, Kind(kind))
    return packed

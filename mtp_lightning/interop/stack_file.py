"""The MTP stack next to a trunk whose layout has no place for it.

EAGLE-3's layer has a layout of its own, a folder inside the trunk's (``eagle3.py``). All other
stacks are in the file ``mtp_heads.safetensors``: its tensors have this project's names and shapes
(``mtp.depths.0...``), and its metadata has one entry, ``mtp_lightning``: the JSON of the stack's
variant and switches, as checkpoints store them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mtp_lightning.errors import UserError, reason_of
from mtp_lightning.interop import eagle3, tensor_files
from mtp_lightning.interop.conversion import stored_dtype, weights_of
from mtp_lightning.interop.tensor_files import StoredTensor
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.weights import Stored

FILE = "mtp_heads.safetensors"
_KEY = "mtp_lightning"


def where(config: ModelConfig) -> str:
    """The name of the file, or of the folder, that holds a model's stack."""
    return eagle3.FOLDER if eagle3.fits(config) else FILE


def is_there(folder: Path) -> bool:
    """Whether a folder holds a stack next to the trunk."""
    return (folder / FILE).is_file() or eagle3.is_there(folder)


def tensors(model: MTPModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stack's part of a model's weights; experts' biases stay in float32, and ids as they
    are."""
    stack = {}
    for name, tensor in weights_of(model).items():
        if name.startswith("mtp."):
            kind = stored_dtype(name, dtype) if tensor.is_floating_point() else tensor.dtype
            stack[name] = tensor.to(kind).contiguous()
    return stack


def write(folder: Path, model: MTPModel, dtype: torch.dtype, *, max_positions: int) -> None:
    """Write a model's stack into the trunk's folder, its tensors in ``dtype``. The folder states
    ``max_positions`` as its context length."""
    if eagle3.fits(model.config):
        eagle3.write(folder, model, dtype, max_positions=max_positions)
        return
    # One key, since the order of several is not fixed.
    metadata = {_KEY: json.dumps(model.config.mtp.to_dict(), sort_keys=True)}
    tensor_files.write(folder / FILE, tensors(model, dtype), metadata)


def read(
    folder: Path,
    trunk: TrunkConfig,
    embedding: StoredTensor | None = None,
    *,
    allow: Collection[str] = (),
) -> tuple[MTPConfig, Mapping[str, Stored | Tensor]]:
    """The stack next to a trunk, which may use variants of the packages in ``allow``, and its
    weights. Copies of the trunk's ``embedding`` must equal it.

    Raises:
        UserError: for a damaged file, or a stack that this version does not know.
    """
    if eagle3.is_there(folder):
        return eagle3.read(folder, trunk, embedding, allow=allow)
    weights, metadata = tensor_files.open_file(folder / FILE)
    try:
        config = MTPConfig.from_dict(json.loads(metadata.get(_KEY, "")), allow=allow)
        if trunks := [name for name in weights if not name.startswith("mtp.")]:
            raise ValueError(f"{trunks[0]} belongs to the trunk")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{folder / FILE} does not describe its tensors: {reason_of(error)}."
        ) from error
    return config, weights

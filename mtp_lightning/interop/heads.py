"""The extra file for MTP heads without a Hugging Face layout: ``mtp_heads.safetensors``.

Its tensors have this project's names and shapes (``mtp.depths.0...``). Its metadata has one entry,
``mtp_lightning``: the JSON of the stack's variant and switches, as checkpoints store them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop import tensor_files
from mtp_lightning.interop.parts import Part
from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.base import MTPConfig

FILE = "mtp_heads.safetensors"
_KEY = "mtp_lightning"


def is_there(folder: Path) -> bool:
    """Whether a folder has such a file."""
    return (folder / FILE).is_file()


def tensors(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The stack's part of a model's weights; experts' biases stay in float32, and ids as they
    are."""
    return {
        name: _stored(name, tensor, dtype).contiguous()
        for name, tensor in weights.items()
        if name.startswith("mtp.")
    }


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if name.endswith("expert_bias"):
        return tensor.float()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def metadata(config: ModelConfig) -> dict[str, str]:
    """The file's metadata. It has one key, since the order of several is not fixed."""
    return {_KEY: json.dumps(config.mtp.to_dict(), sort_keys=True)}


def read(folder: Path, *, allow: Collection[str] = ()) -> tuple[MTPConfig, dict[str, Part]]:
    """The stack and its weights.

    Args:
        folder: the folder of the file.
        allow: packages whose variants it may use.

    Raises:
        UserError: for a damaged file, or a stack that this version does not know.
    """
    found, described = tensor_files.parts(folder / FILE)
    try:
        config = MTPConfig.from_dict(json.loads(described.get(_KEY, "")), allow=allow)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / FILE} does not describe its tensors: {error}.") from error
    return config, found

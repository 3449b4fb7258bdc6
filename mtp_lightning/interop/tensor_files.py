"""Safetensors files: plain tensors, which no reader can be made to execute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mtp_lightning.errors import UserError


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one file, and its metadata.

    Raises:
        UserError: it is damaged, or the package is missing.
        OSError: it cannot be read.
    """
    library = _library()
    try:
        with library.safe_open(file, "pt") as content:
            names = content.keys()
            return {name: content.get_tensor(name) for name in names}, content.metadata() or {}
    except library.SafetensorError as error:
        raise UserError(f"{file} is damaged or no safetensors file: {error}.") from error


def write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one file. Equal tensors give equal bytes, if ``metadata`` has one key at most.

    Raises:
        UserError: the package is missing.
        OSError: a full disk, among others.
    """
    _library()
    from safetensors.torch import save

    # The library refuses tensors that share memory, as copies of the embedding do.
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    file.write_bytes(save(apart, metadata=metadata))


def _library() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise UserError(
            "Hugging Face folders need the package safetensors: pip install -e '.[hf]'"
        ) from error
    return safetensors

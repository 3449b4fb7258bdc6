"""Safetensors files: plain tensors, from which no reader can execute anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop.parts import Part


class FilePart(Part):
    """A tensor of a safetensors file. The file is mapped again for every read, since the pages of a
    map stay in memory as long as the map.

    Args:
        file: the file.
        name: name of the tensor.
        tensor: the tensor, whose shape and dtype are kept.
    """

    def __init__(self, file: Path, name: str, tensor: Tensor) -> None:
        self.file, self.name = file, name
        self._shape, self.dtype = tensor.shape, tensor.dtype

    @property
    def shape(self) -> torch.Size:
        return self._shape

    def read(self) -> Tensor:
        with _opened(self.file) as content:
            found: Tensor = content.get_tensor(self.name)
            return found


def parts(file: Path) -> tuple[dict[str, Part], dict[str, str]]:
    """The tensors of one file, unread, and its metadata.

    Raises:
        UserError: if it is damaged, or the package is missing.
        OSError: if it cannot be read.
    """
    with _opened(file) as content:
        names = content.keys()
        found: dict[str, Part] = {
            name: FilePart(file, name, content.get_tensor(name)) for name in names
        }
        return found, content.metadata() or {}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    library = _library()
    try:
        with library.safe_open(file, "pt") as content:
            yield content
    except library.SafetensorError as error:
        raise UserError(f"{file} is damaged or not a safetensors file: {error}.") from error


def write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes one file. Equal tensors give equal bytes, if ``metadata`` has one key at most.

    Raises:
        UserError: if the package is missing.
        OSError: for a full disk, among others.
    """
    _library()
    from safetensors.torch import save

    # The library refuses tensors that share memory, such as copies of the embedding.
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    file.write_bytes(save(apart, metadata=metadata))


def write_folder(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Makes a folder of a ``config.json`` and one file of tensors; errors as :func:`write`."""
    folder.mkdir()
    text = json.dumps(fields, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    write(folder / "model.safetensors", tensors, {"format": "pt"})


def _library() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise UserError(
            "Files of safetensors need the package safetensors: pip install -e '.[hf]'"
        ) from error
    return safetensors

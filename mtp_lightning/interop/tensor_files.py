"""Tensors of files that are read when needed, so that a model is filled one tensor at a time.

Holding all of a model's tensors next to the model that they fill would double its memory. The files
of this module are those of safetensors: plain tensors, from which no reader can execute anything.
"""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning import stored
from mtp_lightning.errors import UserError, counted, require_package
from mtp_lightning.interop.weight_map import MappedWeight
from mtp_lightning.nn.weight_scales import WeightScales
from mtp_lightning.weights import Stored

log = logging.getLogger(__name__)

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class StoredTensor(Stored):
    """One tensor of a file."""

    dtype: torch.dtype  # the stored one

    @abstractmethod
    def read(self) -> Tensor:
        """The values, to be used and released: they may be in the file's pages."""

    def copy_to(self, target: Tensor) -> None:
        target.copy_(self.read())


@dataclass(frozen=True)
class Assembled(Stored):
    """A tensor of this project, assembled from those of a layout: ``parts``, in the order of
    ``mapped``, which says how they are stacked."""

    mapped: MappedWeight
    parts: tuple[StoredTensor, ...]

    @property
    def shape(self) -> torch.Size:
        rest = self.parts[0].shape[1:]
        rows = sum(part.shape[0] for part in self.parts)
        stacked = self.mapped.stacked
        return torch.Size((rows, *rest) if stacked is None else (stacked, rows // stacked, *rest))

    def copy_to(self, target: Tensor) -> None:
        rows = target if self.mapped.stacked is None else target.flatten(0, 1)
        assert rows.data_ptr() == target.data_ptr()
        order = self.mapped.order
        destinations = None if order is None else torch.tensor(order).argsort()
        begin = 0
        for part in self.parts:
            of_part = slice(begin, begin + part.shape[0])
            if destinations is None:
                part.copy_to(rows[of_part])
            else:
                rows[destinations[of_part]] = part.read().to(rows.dtype)
            begin = of_part.stop

    def scales(self) -> WeightScales | None:
        scales = [s for part in self.parts if (s := part.scales()) is not None]
        if self.mapped.stacked is not None or len(scales) < len(self.parts):
            return None
        return WeightScales.joined(scales, self.mapped.order)


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, in any stored dtype."""
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float())


class SafeTensor(StoredTensor):
    """A tensor of a safetensors file, of which shape and dtype are kept. The file is mapped again
    for every read, since the pages of a map stay in memory as long as the map."""

    def __init__(self, file: Path, name: str, tensor: Tensor) -> None:
        self.file, self.name = file, name
        self._shape, self.dtype = tensor.shape, tensor.dtype

    @property
    def shape(self) -> torch.Size:
        return self._shape

    def read(self) -> Tensor:
        with _opened(self.file) as content:
            tensor: Tensor = content.get_tensor(self.name)
            return tensor


def open_file(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file, unread, and its metadata.

    Raises:
        UserError: if it is damaged, or the package is missing.
        OSError: if it cannot be read.
    """
    with _opened(file) as content:
        names = content.keys()
        tensors: dict[str, StoredTensor] = {
            name: SafeTensor(file, name, content.get_tensor(name)) for name in names
        }
        if n := sum(tensor.dtype == torch.float64 for tensor in tensors.values()):
            log.warning("%s: float64 is rounded to float32 in %s.", file, counted(n, "tensor"))
        return tensors, content.metadata() or {}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    require_package("safetensors", what=str(file), extra="hf")
    import safetensors

    try:
        with safetensors.safe_open(file, "pt") as content:
            yield content
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is damaged or not a safetensors file: {error}.") from error


def write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes one file. Equal tensors give equal bytes, if ``metadata`` has one key at most.

    Raises:
        UserError: if the package is missing.
        OSError: for a full disk, among others.
    """
    require_package("safetensors", what="A file of safetensors", extra="hf")
    from safetensors.torch import save

    # The library refuses tensors that share memory, such as copies of the embedding.
    addresses: set[int] = set()
    unshared: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        unshared[name] = tensor.clone() if tensor.data_ptr() in addresses else tensor
        addresses.add(tensor.data_ptr())
    file.write_bytes(save(unshared, metadata=metadata))


def write_folder(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Makes a folder of a ``config.json`` and one file of tensors; errors as :func:`write`."""
    folder.mkdir()
    write_json(folder / CONFIG, fields)
    write(folder / SINGLE, tensors, {"format": "pt"})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: no such file.
        UserError: it holds something else.
    """
    content = stored.read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object.")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes indented JSON, as transformers does."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # A path in it may have bytes that are not UTF-8.
    file.write_bytes(f"{text}\n".encode(errors="surrogateescape"))

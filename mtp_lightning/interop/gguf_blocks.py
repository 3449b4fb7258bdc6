"""The numbers of a GGUF file's tensors, dequantized in portions, and the scales of their blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop.gguf_layout import GGUFEntry
from mtp_lightning.interop.gguf_reader import FileTensor
from mtp_lightning.interop.tensor_files import StoredTensor
from mtp_lightning.nn.weight_scales import WeightScales

# Bytes of a file that are dequantized at once.
_SLAB = 1 << 20


@dataclass(frozen=True)
class KQuant:
    """Byte ranges of the fields of a K-quant super-block of 256 weights."""

    bits: int  # of q
    group: int  # number of weights that share a step and an offset
    quants: slice  # all bits of q
    lowest: slice  # the lowest four bits of two q a byte
    minimum: slice  # the factor of the offsets; empty if the offset is a multiple of the step


# ggml-common.h of llama.cpp, block_q4_K and the following.
KQUANTS = {
    "Q4_K": KQuant(4, 32, slice(16, 144), slice(16, 144), slice(2, 4)),
    "Q5_K": KQuant(5, 32, slice(16, 176), slice(48, 176), slice(2, 4)),
    "Q6_K": KQuant(6, 16, slice(0, 192), slice(0, 128), slice(0)),
}


@dataclass(frozen=True)
class Blocks(StoredTensor):
    """A tensor in Hugging Face's layout, dequantized when it is read."""

    file: Path
    # A tensor of the file, its entry in the layout, and the index of the matrix if it stacks
    # several, else None. kv_b_proj has two pieces, for keys and for values.
    pieces: tuple[tuple[FileTensor, GGUFEntry, int | None], ...]
    size: tuple[int, ...]  # its shape
    dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.size)

    def copy_to(self, target: Tensor) -> None:
        (tensor, entry, i), *others = self.pieces
        if others or entry.unpack is not GGUFEntry.unpack or not target.is_contiguous():
            super().copy_to(target)
        else:  # without a second copy in memory
            numbers(self.file, tensor, i, out=target)

    def scales(self) -> WeightScales | None:
        (tensor, entry, i), *others = self.pieces
        quant = KQUANTS.get(tensor.kind.name)
        if others or len(self.size) != 2 or quant is None:
            return None
        portions = _portions(self.file, tensor, i)
        pairs = [steps_and_offsets(stored, tensor.kind) for _, stored in portions]
        steps, offsets = (np.concatenate(column) for column in zip(*pairs, strict=True))
        return WeightScales(
            steps=entry.unpack(torch.from_numpy(steps)),
            offsets=entry.unpack(torch.from_numpy(offsets)),
            group=quant.group,
            bits=quant.bits,
        )

    def read(self) -> Tensor:
        portions = [entry.unpack(numbers(self.file, tensor, i)) for tensor, entry, i in self.pieces]
        joined = portions[0] if len(portions) == 1 else torch.cat(portions, dim=1)
        return joined.reshape(self.size).contiguous()


def numbers(
    file: Path, tensor: FileTensor, i: int | None = None, out: Tensor | None = None
) -> Tensor:
    """The values of a tensor of a file, or of matrix ``i`` of those that it stacks, in ``out``,
    which is contiguous, or in a new float32 tensor."""
    from gguf.quants import dequantize

    shape = tensor.shape if i is None else tensor.shape[1:]
    out = torch.empty(shape) if out is None else out
    rows = out.view(-1, shape[-1])
    for row, stored in _portions(file, tensor, i):
        try:
            portion = dequantize(stored, tensor.kind)
        except NotImplementedError as error:
            raise UserError(
                f"{file} has {tensor.name} in {tensor.kind.name}, which the package gguf cannot "
                "dequantize: give a file of another type."
            ) from error
        rows[row : row + len(stored)] = torch.from_numpy(np.ascontiguousarray(portion))
    return out


def _portions(file: Path, tensor: FileTensor, i: int | None) -> Iterator[tuple[int, Any]]:
    """The stored bytes of some rows at a time, with the number of the first row; arguments as
    :func:`numbers`."""
    shape = tensor.shape if i is None else tensor.shape[1:]
    rows, size = math.prod(shape[:-1]), tensor.row_bytes
    begin = tensor.offset + (i or 0) * rows * size
    step = max(1, _SLAB // size)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        # Not through a memory map, whose pages stay in memory.
        stored = np.fromfile(file, np.uint8, count * size, offset=begin + row * size)
        yield row, stored.reshape(count, size)


def steps_and_offsets(stored: Any, kind: Any) -> tuple[Any, Any]:
    """The steps and offsets of K-quants, whose numbers are ``step x q + offset``.

    A super-block holds them as products of an fp16 number and a small integer, so they cannot be
    derived from the numbers as those of Q4_0, Q4_1 and Q8_0 can. They are computed with gguf's own
    dequantization, from super-blocks in which every q is 0, or 1.

    Args:
        stored: bytes [N, ..] of rows of K numbers.
        kind: gguf's type of the numbers, one of :data:`KQUANTS`.

    Returns:
        Two float32 arrays [N, K / group].
    """
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    quant, rows = KQUANTS[kind.name], len(stored)
    _, size = GGML_QUANT_SIZES[kind]

    def first_of_each(blocks: Any) -> Any:
        return dequantize(blocks.reshape(rows, -1), kind)[:, :: quant.group].copy()

    blocks = stored.reshape(-1, size).copy()
    blocks[:, quant.quants] = 0
    offsets = first_of_each(blocks)
    blocks[:, quant.minimum] = 0
    lowest = first_of_each(blocks)
    blocks[:, quant.lowest] = 0x11
    return first_of_each(blocks) - lowest, offsets

"""Weights in fp8 with one scale per block, as DeepSeek-V3 was released: dequantized to float32.

A matrix [R, C] of ``float8_e4m3fn`` comes with ``weight_scale_inv`` [R / b, C / b], rounded up;
each b x b block is multiplied by its scale (README_WEIGHTS of DeepSeek-V3; b = 128).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop.tensor_files import StoredTensor

log = logging.getLogger(__name__)

_SCALE = "_scale_inv"


def block_size(fields: Mapping[str, Any], *, source: str) -> tuple[int, int] | None:
    """The block size of a config.json's scales; None if the weights are not quantized.

    Raises:
        UserError: for another quantization.
    """
    match fields.get("quantization_config"):
        case None:
            return None
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if (
            min(rows, columns) > 0
        ):
            return rows, columns
        case other:
            names = ("quant_method", "weight_block_size")
            shown = {n: other.get(n) for n in names} if isinstance(other, Mapping) else other
            raise UserError(
                f"{source} has quantization_config={str(shown)[:200]}: only fp8 with one scale per "
                "block, quant_method=fp8 and weight_block_size as in DeepSeek-V3, can be imported."
            )


@dataclass(frozen=True)
class Scaled(StoredTensor):
    """A matrix of a file, multiplied by its blocks' scales."""

    weight: StoredTensor
    scale: StoredTensor
    block: tuple[int, int]
    dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def read(self) -> Tensor:
        return scaled(self.weight.read(), self.scale.read(), self.block)


def dequantize(tensors: dict[str, StoredTensor], block: tuple[int, int], *, source: str) -> None:
    """Replaces every fp8 matrix and its scales by their product, float32, in place.

    Raises:
        UserError: for scales without their matrix, or of another shape.
    """
    names = [name for name in tensors if name.endswith(_SCALE)]
    for name in names:
        matrix = name.removesuffix(_SCALE)
        scale = tensors.pop(name)
        if matrix not in tensors:
            raise UserError(f"{name} in {source} scales {matrix}, which is not there.")
        shape = tensors[matrix].shape
        if len(shape) != 2:
            raise UserError(f"{name} in {source} scales {matrix}, which is not a matrix.")
        wanted = tuple(-(-size // width) for size, width in zip(shape, block, strict=True))
        if tuple(scale.shape) != wanted:
            raise UserError(
                f"{name} in {source} has the shape {list(scale.shape)} where {list(wanted)} is "
                f"needed, one per block of {block[0]} x {block[1]}."
            )
        tensors[matrix] = Scaled(tensors[matrix], scale, block)
    if names:
        log.warning("%s: %d matrices in fp8 are dequantized to float32.", source, len(names))


def scaled(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """One matrix [R, C] times its blocks' scales [R / b, C / b], float32."""
    rows, columns = weight.shape
    product = weight.to(torch.float32)
    by_row = scale.float().repeat_interleave(block[0], 0)[:rows]
    for start in range(0, columns, block[1]):  # avoids a second matrix of the whole size
        product[:, start : start + block[1]] *= by_row[:, start // block[1]].unsqueeze(1)
    return product

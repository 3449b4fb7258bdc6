"""The steps and offsets of GGUF's K-quants, whose numbers are ``step x q + offset``.

A super-block holds them as products of an fp16 number and a small integer, so that they cannot be
found in the numbers as those of Q4_0, Q4_1 and Q8_0 can. gguf's own dequantization tells them, of
super-blocks in which every q is 0, or 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KQuant:
    """Where a super-block of 256 numbers has what; slices of its bytes.

    Attributes:
        bits: of q.
        group: the numbers that share a step and an offset.
        quants: all bits of q.
        lowest: the lowest four bits of two q a byte.
        minimum: the factor of the offsets; empty if the offset is a multiple of the step.
    """

    bits: int
    group: int
    quants: slice
    lowest: slice
    minimum: slice


# ggml-common.h of llama.cpp, block_q4_K and the following.
KQUANTS = {
    "Q4_K": KQuant(4, 32, slice(16, 144), slice(16, 144), slice(2, 4)),
    "Q5_K": KQuant(5, 32, slice(16, 176), slice(48, 176), slice(2, 4)),
    "Q6_K": KQuant(6, 16, slice(0, 192), slice(0, 128), slice(0)),
}


def steps_and_offsets(stored: Any, kind: Any) -> tuple[Any, Any]:
    """Two float32 arrays [N, K / group] of the bytes [N, ..] of a tensor of a type of
    :data:`KQUANTS`."""
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

"""A frozen trunk's matrices held in bf16, for half of their memory.

Nothing else changes: under autocast to bf16 a product rounds its weight to the same numbers, and
outside it, when decoding, and for experts on a CPU, the weight is one of fp32 again for the time of
a product. Embedding, head, norms and routers stay as they are.
"""

from __future__ import annotations

import torch

from mtp_lightning.nn.experts import Experts
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.moe import Router
from mtp_lightning.nn.trunk import Trunk


def hold_in_bf16(trunk: Trunk) -> None:
    """Turn the matrices of a trunk's layers into bf16, in place. Layers of others than this
    project's are left alone: theirs to know what they compute with."""
    for layer in trunk.blocks.modules():
        if isinstance(layer, Linear | Experts) and not isinstance(layer, Router):
            for weight in layer.parameters(recurse=False):
                weight.data = weight.data.to(torch.bfloat16)

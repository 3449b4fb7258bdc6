"""Hold a frozen trunk's matrices in bf16, in half of their memory.

The results under bf16 autocast stay the same, since it would round the weights to the same numbers.
Without autocast (in decoding, and for experts on a CPU) a weight is cast to fp32 for each product.
Embedding, head, norms and routers stay unchanged.
"""

from __future__ import annotations

import torch

from mtp_lightning.nn.experts import Experts
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.moe import Router
from mtp_lightning.nn.trunk import Trunk


def hold_in_bf16(trunk: Trunk) -> None:
    """Cast the matrices of a trunk's layers to bf16, in place. Layers from outside this project
    stay unchanged, since they may need their own dtype."""
    for layer in trunk.blocks.modules():
        if isinstance(layer, Linear | Experts) and not isinstance(layer, Router):
            for weight in layer.parameters(recurse=False):
                weight.data = weight.data.to(torch.bfloat16)

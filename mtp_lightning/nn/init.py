"""Initialization that depends only on a parameter's name and the seed.

Every parameter is drawn from its own stream of random numbers. So a trunk starts from the same
weights with any stack on it, and runs that differ in depth or head can be compared seed by seed.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def parameter_seed(seed: int, name: str) -> int:
    """A 32-bit seed from a run's seed and a parameter's name.

    PyTorch's CPU generator ignores higher bits. Among n streams, about n^2 / 2^33 pairs coincide.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    # Bits 1 to 32: changing them would change every seeded run.
    return (int.from_bytes(digest[:8], "little") >> 1) % 2**32


def generator(seed: int, name: str) -> torch.Generator:
    """A stream of random numbers by a run's seed and a name, so that no random state is stored."""
    return torch.Generator().manual_seed(parameter_seed(seed, name))


@torch.no_grad()
def initialize(model: nn.Module, *, std: float, seed: int) -> None:
    """Matrices from N(0, std^2), gains 1, biases 0 (DeepSeek-V3, section 4.2: one std for all).
    Buffers that training changes (the experts' biases) are reset too.

    Random numbers are drawn on the CPU in fp32, so that the weights do not depend on the device.
    """
    from mtp_lightning import processes

    for module in model.modules():
        if callable(reset := getattr(module, "reset_buffers", None)):
            reset()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(0.0 if "bias" in name.rpartition(".")[2] else 1.0)
            continue
        values = torch.empty(parameter.shape, dtype=torch.float32)
        values.normal_(0.0, std, generator=generator(seed, name))
        # For sharded parameters, every rank draws the full tensor and keeps its shard.
        parameter.copy_(processes.tensors().own_part(values, parameter))


def sets_everything(model: nn.Module) -> bool:
    """Whether :func:`initialize` sets every parameter and buffer of a model; if not, the buffers
    must be set when the model is built."""
    return all(
        callable(getattr(module, "reset_buffers", None)) or not list(module.buffers(recurse=False))
        for module in model.modules()
    )

"""Small random models, and windows for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data_modules.windows import WindowBatch
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.moe import routers_of
from mtp_lightning.weights import StoredModel

# A tree of tokens, and its paths from the root.
PARENTS = [-1, 0, 0, 1, 1, 2, 5, 3]
PATHS = [[0, 1, 3, 7], [0, 1, 4], [0, 2, 5, 6]]


def build(trunk: TrunkConfig, mtp: MTPConfig | str, seed: int = 0, **switches: Any) -> MTPModel:
    """A model of which every weight is random; ``mtp`` may be a head's name, with its switches.

    Gains that are 1, matrices and experts' biases that are 0 would hide a mistake: a norm in the
    wrong place, a head that does nothing.
    """
    mtp = MTPConfig.find(mtp)(**switches) if isinstance(mtp, str) else mtp
    model = MTPModel(ModelConfig(trunk=trunk, mtp=mtp))
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            elif not parameter.any():  # Medusa's matrices start at zero
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for router in routers_of(model).values():
            router.expert_bias.normal_(0, 0.1, generator=generator)
    return model


def as_stored(model: MTPModel) -> StoredModel:
    """A model as it is read from a checkpoint."""
    return StoredModel(
        path=Path("old.ckpt"), config=model.config, weights=model.state_dict(), tokenizer_state={}
    )


def stored_of(trunk: TrunkConfig, mtp: MTPConfig) -> StoredModel:
    """A checkpoint's content, of which every weight is random: also gains and biases."""
    return as_stored(build(trunk, mtp, seed=5))


def windows(rows: int, seq_len: int, depth: int, *, borders: float = 0.0) -> WindowBatch:
    """Random tokens below 37, the vocabulary of ``tiny_trunk``; with ``borders``, a document begins
    at each of them with this probability."""
    generator = torch.Generator().manual_seed(1)
    shape = (rows, seq_len + depth + 1)
    tokens = torch.randint(0, 37, shape, generator=generator)
    starts = torch.rand(shape, generator=generator) < borders
    return WindowBatch(tokens, depth, starts.long().cumsum(1) if borders else None)


def target_counts(batch: WindowBatch) -> torch.Tensor:
    """``[D + 1]`` int64 number of valid targets of every depth."""
    return torch.stack([(batch.targets(k) >= 0).sum() for k in range(batch.depth + 1)])


def checkpoint_of(model: MTPModel) -> dict[str, Any]:
    """The keys of a run's checkpoint that are read, for a model."""
    return {
        "model_config": model.config.to_dict(),
        "state_dict": {f"model.{name}": t for name, t in model.state_dict().items()},
        "tokenizer": {},
        "config": {},
        "global_step": 3,
    }

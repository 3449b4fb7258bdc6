"""Tiny DeepSeek models that several tests build."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig
from tests import models

LATENT = LatentAttentionConfig(q_rank=12, kv_rank=10, d_nope=8, d_rope=4, d_value=6)
EXPERTS = ExpertsConfig(
    n_routed=8, n_shared=1, top_k=2, d_expert=16, first_k_dense=1, n_groups=4, top_groups=2,
    scaling=2.5,
)  # fmt: skip
TRUNK = TrunkConfig(
    vocab_size=37, d_model=32, n_layers=3, n_heads=4, n_kv_heads=4, d_ff=48,
    attention=LATENT, feed_forward=EXPERTS,
)  # fmt: skip


def trunk(
    *, latent: dict[str, Any] | None = None, experts: dict[str, Any] | None = None, **rest: Any
) -> TrunkConfig:
    """:data:`TRUNK` with changes."""
    base = replace(TRUNK, d_head=None)
    return replace(
        base,
        attention=replace(LATENT, **(latent or {})),
        feed_forward=replace(EXPERTS, **(experts or {})),
        **rest,
    )


def build(config: TrunkConfig, *, depth: int = 0, seed: int = 0, **mtp: Any) -> MTPModel:
    """A random model with sequential modules."""
    return models.build(config, SequentialConfig(depth=depth, **mtp), seed)

"""Stacks that start from three states inside the trunk, of a low, a middle and a high block
(EAGLE-3, Li et al. 2025, arXiv 2503.01840).

Shapes: B batch, T positions, C d_model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.mtp.config import ModulesConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.trunk import Trunk, TrunkOutput
from mtp_lightning.settings import is_whole


@dataclass(frozen=True, kw_only=True)
class InnerStatesConfig(ModulesConfig):
    """Switches of a stack with a cache of its own, of keys and values of whole heads.

    Attributes:
        layers: after how many of the trunk's blocks the three states are read; None for
            :func:`default_layers`.
    """

    meaning: ClassVar[tuple[str, ...]] = ("layers",)
    n_states: ClassVar[int] = 3
    # The states are read before the trunk's final norm.
    input_norm = "pre"

    layers: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            return
        # Any sequence, such as a list of YAML or JSON.
        layers = tuple(self.layers) if isinstance(self.layers, Sequence) else (self.layers,)
        if len(layers) != 3 or not all(is_whole(n) and n >= 0 for n in layers):
            raise UserError(
                f"mtp.layers={self.layers} must be three whole numbers of at least 0: after how "
                "many of the trunk's blocks each state is read."
            )
        object.__setattr__(self, "layers", layers)

    def check_trunk(self, trunk: TrunkConfig) -> None:
        """Raise a ``UserError`` for a trunk with other attention, or with too few blocks."""
        whole_heads = 2 * trunk.n_kv_heads, trunk.d_head, trunk.d_head
        entry = trunk.attention.cache_entry(trunk)
        rope_head_dim = trunk.attention.rope_head_dim(trunk)
        if (entry.n_vectors, entry.width, rope_head_dim) != whole_heads:
            raise UserError(
                f"mtp={self.variant} stores keys and values of whole heads, and the cache of "
                f"the {trunk.attention.variant} attention does not: use a model with "
                "grouped-query attention, such as model=nano."
            )
        if self.layers is not None and max(self.layers) > trunk.n_layers:
            raise UserError(
                f"mtp.layers={list(self.layers)} reads states after {max(self.layers)} blocks, and "
                f"the trunk has model.n_layers={trunk.n_layers}: give numbers up to that."
            )

    def layers_of(self, n_layers: int) -> tuple[int, int, int]:
        """After how many of ``n_layers`` blocks the states are read."""
        return default_layers(n_layers) if self.layers is None else self.layers

    @property
    def read_states(self) -> tuple[Any, ...]:
        return "inner", self.layers

    def shared_blocks(self, n_layers: int) -> int:
        return max(self.layers_of(n_layers))


def default_layers(n_layers: int) -> tuple[int, int, int]:
    """2, L / 2 and L - 3 blocks, as in EAGLE-3's released code and in servers. These do not ascend
    for L < 7, where it is (L - 1) / 3, L / 2 and L - 1; for L < 3 the last one is L."""
    if n_layers < 7:
        return (n_layers - 1) // 3, n_layers // 2, n_layers - (n_layers > 2)
    return 2, n_layers // 2, n_layers - 3


class InnerStates(MTPStack):
    """A stack whose branch is the three states side by side, [B, T, 3 C]."""

    config: InnerStatesConfig

    def __init__(self, config: InnerStatesConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        config.check_trunk(trunk)
        self.trunk_config = trunk

    @property
    def blocks_kept(self) -> Collection[int]:
        return self.config.layers_of(self.trunk_config.n_layers) if self.depth else ()

    def branch(self, trunk: Trunk, output: TrunkOutput) -> Tensor:
        states = torch.cat([output.after[n] for n in self.blocks_kept], dim=-1)
        return states if self.config.detach == "none" else states.detach()

"""DeepSeek-V3's sequential modules (report, section 2.2, eq. 21-25): a causal chain of depths.

    x^k_i = eh_proj([enorm(Emb(t_{i+k})) ; hnorm(h^{k-1}_i)])
    h^k   = norm_k(Block_k(x^k))

Embedding and output head are the trunk's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mtp_lightning.mtp.base import MTPConfig, MTPStack
from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.trunk import Trunk, TrunkOutput

Branch = Literal["final", "before_last"]
InputNorm = Literal["post", "pre"]
Concat = Literal["embedding_first", "hidden_first"]
Detach = Literal["none", "trunk", "all"]


@dataclass(frozen=True, kw_only=True)
class SequentialConfig(MTPConfig):
    """Switches of the sequential stack; where systems differ, the default is DeepSeek-V3's.

    Attributes:
        branch: ``final`` reads the whole trunk; ``before_last`` all blocks but the last, which is
            then the main prediction's own.
        input_norm: ``post`` gives depth 1 the state after the trunk's final norm (Megatron,
            transformers, vLLM), ``pre`` the state before it (torchtitan, MaxText).
        concat: order of the two halves that ``eh_proj`` reads. ``embedding_first`` is that of the
            released weights, ``hidden_first`` that of the report's equation (and MiMo).
        detach: ``trunk`` stops the depths' gradients at the trunk's hidden state, once, before
            the first depth; ``all`` also at the shared embedding and head.
        share_layers: one module is applied D times (FastMTP; Megatron mtp_use_repeated_layer).

    Raises:
        ValueError: a switch has a value that it does not know.
    """

    branch: Branch = "final"
    input_norm: InputNorm = "post"
    concat: Concat = "embedding_first"
    detach: Detach = "none"
    share_layers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("branch", Branch),
            ("input_norm", InputNorm),
            ("concat", Concat),
            ("detach", Detach),
        ):
            value = getattr(self, name)
            if value not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise ValueError(f"mtp.{name}={value} is unknown: choose one of {known}.")

    def build(self, trunk: TrunkConfig) -> SequentialMTP:
        return SequentialMTP(self, trunk)

    def num_params(self, trunk: TrunkConfig) -> int:
        c = trunk.d_model
        module = trunk.block_params() + 2 * c * c + 3 * c
        return module * (min(self.depth, 1) if self.share_layers else self.depth)

    def flops(self, trunk: TrunkConfig, seq_len: int, active: Sequence[int]) -> int:
        # A depth needs all shallower modules, but not their logits.
        module = trunk.block_flops(seq_len) + 2 * 2 * trunk.d_model**2
        return max(active, default=0) * module + len(active) * trunk.head_flops()


class SequentialModule(nn.Module):
    """One depth: two norms, a projection of twice the width, a block, an output norm."""

    def __init__(self, config: SequentialConfig, trunk: TrunkConfig) -> None:
        super().__init__()
        self.hidden_first = config.concat == "hidden_first"
        self.enorm = RMSNorm(trunk.d_model, trunk.norm_eps)
        self.hnorm = RMSNorm(trunk.d_model, trunk.norm_eps)
        self.eh_proj = Linear(2 * trunk.d_model, trunk.d_model)
        self.block = Block(trunk)
        self.norm = RMSNorm(trunk.d_model, trunk.norm_eps)

    def forward(self, hidden_BTC: Tensor, embedded_BTC: Tensor, positions: Positions) -> Tensor:
        halves = [self.enorm(embedded_BTC), self.hnorm(hidden_BTC)]
        if self.hidden_first:
            halves.reverse()
        return self.norm(self.block(self.eh_proj(torch.cat(halves, dim=-1)), positions))


class SequentialMTP(MTPStack):
    """D modules, or one applied D times."""

    def __init__(self, config: SequentialConfig, trunk: TrunkConfig) -> None:
        super().__init__(config.depth)
        self.config = config
        n_modules = min(config.depth, 1) if config.share_layers else config.depth
        self.depths = nn.ModuleList(SequentialModule(config, trunk) for _ in range(n_modules))

    def branch(self, trunk: Trunk, output: TrunkOutput) -> Tensor:
        if self.config.branch == "before_last":
            hidden = output.before_last
            hidden = trunk.norm(hidden) if self.config.input_norm == "post" else hidden
        else:
            hidden = output.final if self.config.input_norm == "post" else output.last_block
        # Once, before the loop over depths: cut at every depth, the earlier modules would learn
        # from their own loss alone.
        return hidden if self.config.detach == "none" else hidden.detach()

    @property
    def trains_head(self) -> bool:
        return self.config.detach != "all"

    def step(
        self,
        k: int,
        *,
        branch_BTC: Tensor,
        previous_BTC: Tensor,
        embedded_BTC: Tensor,
        positions: Positions,
    ) -> Tensor:
        if self.config.detach == "all":
            embedded_BTC = embedded_BTC.detach()
        module = self.depths[0 if self.config.share_layers else k - 1]
        return module(previous_BTC, embedded_BTC, positions)

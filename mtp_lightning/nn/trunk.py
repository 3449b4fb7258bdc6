"""The trunk: embedding, blocks, final norm. Tokens in, hidden states out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.narrow import NarrowBlocks
from mtp_lightning.nn.narrow_passes import NarrowTrunk
from mtp_lightning.nn.norm import RMSNorm


@dataclass(frozen=True)
class TrunkOutput:
    """What prediction heads may read from the trunk, each [B, T, C].

    Attributes:
        final: after all blocks and the norm: h^0 of docs/semantics.md, what the head projects.
        last_block: after all blocks, before the final norm.
        before_last: after all blocks but the last, before any norm.
    """

    final: Tensor
    last_block: Tensor
    before_last: Tensor


class Trunk(nn.Module):
    """A pre-norm decoder without its output head.

    Attributes:
        packed: all blocks but the last, and the last with the norm, as narrow passes of decoding
            compute them, while they do.
    """

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.packed: tuple[NarrowBlocks, NarrowBlocks] | None = None

    def pack(self) -> tuple[NarrowBlocks, NarrowBlocks] | None:
        *before, last = self.blocks
        shared, own = NarrowBlocks.of(before), NarrowBlocks.of([last], self.norm)
        return None if shared is None or own is None else (shared, own)

    def narrow(self, head: Head, branch: Callable[[TrunkOutput], Tensor]) -> NarrowTrunk | None:
        """The trunk with packed weights, from ids to logits in one call; None where there is no
        code for that.

        Args:
            head: what makes the logits.
            branch: what the modules start from.
        """
        if type(self) is not Trunk or self.packed is None:
            return None
        # Which of the states it is shows on any numbers.
        c = self.config.d_model
        before_last, last_block, final = torch.arange(1.0, 3 * c + 1).view(3, 1, 1, c)
        found = branch(TrunkOutput(final, last_block, before_last))
        known = before_last, self.norm(before_last), last_block, final
        kept = next((i for i, state in enumerate(known) if torch.equal(state, found)), None)
        if kept is None:
            return None
        return NarrowTrunk.of(self.packed, head.packed, self.embedding.weight, kept=kept)

    def forward(self, embedded_BTC: Tensor, positions: Positions) -> TrunkOutput:
        """Embedded tokens [B, T, C] -> hidden states.

        The caller embeds, because prediction depths read the same embedding, shifted: one look-up
        serves them all.
        """
        h_BTC = before_last = embedded_BTC
        if self.packed is not None and self.packed[0].fits(h_BTC, positions):
            before_last, _ = self.packed[0](h_BTC, positions)
            h_BTC, final_BTC = self.packed[1](before_last, positions, len(self.blocks) - 1)
            return TrunkOutput(final_BTC, h_BTC, before_last)
        for layer, block in enumerate(self.blocks):
            before_last, h_BTC = h_BTC, block(h_BTC, positions, layer)
        return TrunkOutput(self.norm(h_BTC), h_BTC, before_last)

"""The trunk: embedding, blocks, final norm. Tokens in, hidden states out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.linear import embedding
from mtp_lightning.nn.norm import RMSNorm


@dataclass(frozen=True)
class TrunkOutput:
    """The trunk's hidden states that prediction heads may read, each [B, T, C]."""

    # After all blocks and the norm: h^0 of docs/semantics.md, which the head projects.
    final: Tensor
    pre_norm: Tensor  # after all blocks, before the final norm
    before_last: Tensor  # after all blocks except the last, before any norm
    # Number of blocks -> the state after them, for the numbers in ``Trunk.keep_after``; 0 is the
    # embedding.
    after: Mapping[int, Tensor] = field(default_factory=dict)


class Trunk(nn.Module):
    """A pre-norm decoder without its output head. A pass keeps the state after each number of
    blocks in ``keep_after``, in :attr:`TrunkOutput.after`."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        self.keep_after: Collection[int] = ()
        self.embedding = embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, embedded_BTC: Tensor, ctx: ForwardContext) -> TrunkOutput:
        """Embedded tokens [B, T, C] -> hidden states.

        The caller embeds the tokens: one lookup also serves the prediction depths, which read the
        same embeddings, shifted.
        """
        h_BTC = before_last = embedded_BTC
        after = {0: h_BTC} if 0 in self.keep_after else {}
        for layer, block in enumerate(self.blocks):
            before_last, h_BTC = h_BTC, block(h_BTC, ctx, layer)
            if layer + 1 in self.keep_after:
                after[layer + 1] = h_BTC
        return TrunkOutput(self.norm(h_BTC), h_BTC, before_last, after)

    def state(self, output: TrunkOutput, branch: str, input_norm: str) -> Tensor:
        """The hidden state [B, T, C] after all blocks (``final``) or after all except the last
        (``before_last``), after the final norm (``post``) or before it (``pre``)."""
        normed = input_norm == "post"
        if branch == "final":
            return output.final if normed else output.pre_norm
        return self.norm(output.before_last) if normed else output.before_last

    def hold_in_bf16(self) -> None:
        """Hold the matrices of a frozen trunk in bf16, in half of their memory.

        The results under bf16 autocast stay the same, since it would round the weights to the same
        numbers. Without autocast (in decoding, and for experts on a CPU) a weight is cast to fp32
        for each product. Embedding, head, norms and routers stay unchanged, and so do layers from
        outside this project, which may need their own dtype.
        """
        for layer in self.blocks.modules():
            if getattr(layer, "may_be_bf16", False):
                for weight in layer.parameters(recurse=False):
                    weight.data = weight.data.to(torch.bfloat16)

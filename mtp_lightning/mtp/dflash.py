"""DFlash's block drafter (Chen, Liang & Liu 2026, arXiv 2602.06036; code: z-lab/dflash).

One pass drafts all D tokens. It reads a block: the newest token of the text, and D masks.

    f_t       = norm W_fc [l_t ; m_t ; h_t]          states of a low, a middle and a high layer
    y_0 .. y_D = E(x_{t+1}), mask, .., mask           at the positions t + 1 .. t + D + 1
    y         = y + Attention(norm y ; f_1 .. f_t)    in every layer
    y         = y + SwiGLU(norm y)
    h^k_t     = norm y_k

and the shared head predicts ``x_{t+k+1}`` from ``h^k``. A layer computes keys and values of the
block from ``norm y``, and those of the text from f, by the same matrices. Every position of the
block attends to the text up to t and to the whole block. So a draft knows ``x_{t+1}``, and none of
the drafts before it. ``correction`` (``correction.py``) shows it the last of these: with ``markov``
the drafter is DSpark's (arXiv 2607.05147), with ``selector`` DFlash 2's without its convolutions.

In training, a block follows every token. In decoding, the layers' cache holds the keys and values
of the text; those of a block are overwritten in the next round.

Shapes: B batch, T positions, J = D + 1 positions of a block, C d_model, N heads, M key heads,
H head size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtp_lightning.mtp.block_attention import Entry, attend_blocks, block_rotary
from mtp_lightning.mtp.correction import Bigrams, CorrectedConfig
from mtp_lightning.mtp.inner_states import InnerStates, InnerStatesConfig
from mtp_lightning.mtp.inputs import StackInputs, TrunkText
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.feed_forward import FeedForward
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.ops import rotary
from mtp_lightning.nn.rope import rotate_in_place
from mtp_lightning.nn.trunk import Trunk
from mtp_lightning.settings import require_whole


@dataclass(frozen=True, kw_only=True)
class DFlashConfig(CorrectedConfig, InnerStatesConfig, variant="dflash"):
    """Switches of the block drafter.

    Attributes:
        depth: D, masks of a block.
        blocks: layers that the block goes through.
    """

    supported_corrections: ClassVar[tuple[str, ...]] = ("markov", "selector")

    blocks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("mtp.blocks", self.blocks, least=1)

    def build(self, trunk: TrunkConfig) -> DFlashMTP:
        return DFlashMTP(self, trunk)


class BlockAttention(nn.Module):
    """Grouped-query attention of a block, with an RMSNorm of every query and key head."""

    def __init__(self, trunk: TrunkConfig) -> None:
        super().__init__()
        self.n_kv_heads, self.d_head = trunk.n_kv_heads, trunk.d_head
        width = trunk.n_heads * trunk.d_head
        self.query = Linear(trunk.d_model, width)
        self.key_value = Linear(trunk.d_model, 2 * trunk.n_kv_heads * trunk.d_head)
        self.out = Linear(width, trunk.d_model)
        self.query_norm = RMSNorm(trunk.d_head, trunk.norm_eps)
        self.key_norm = RMSNorm(trunk.d_head, trunk.norm_eps)

    def queries(self, x_BPC: Tensor) -> Tensor:
        """[B, P, N, H] before RoPE."""
        return self.query_norm(self.query(x_BPC).unflatten(-1, (-1, self.d_head)))

    def entry(self, x_BPC: Tensor) -> Entry:
        """Keys before RoPE, and values, [B, P, M, H] each."""
        heads = self.key_value(x_BPC).unflatten(-1, (-1, self.d_head))
        key, value = heads.split(self.n_kv_heads, dim=2)
        return self.key_norm(key), value


class BlockLayer(nn.Module):
    """One layer of the drafter."""

    def __init__(self, trunk: TrunkConfig) -> None:
        super().__init__()
        self.recompute = trunk.recompute
        self.attention_norm = RMSNorm(trunk.d_model, trunk.norm_eps)
        self.attention = BlockAttention(trunk)
        self.feed_forward_norm = RMSNorm(trunk.d_model, trunk.norm_eps)
        self.feed_forward = FeedForward(trunk.d_model, trunk.d_ff)

    def forward(self, y_BTJC: Tensor, text_BTC: Tensor, ctx: BlockContext) -> Tensor:
        """The blocks after every token of whole windows, [B, T, J, C]."""
        if self.recompute and self.training and torch.is_grad_enabled():
            arguments = y_BTJC, text_BTC, ctx
            return checkpoint(
                self._compute, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        return self._compute(y_BTJC, text_BTC, ctx)

    def _compute(self, y_BTJC: Tensor, text_BTC: Tensor, ctx: BlockContext) -> Tensor:
        attention, shape = self.attention, y_BTJC.shape[1:3]
        x_BPC = self.attention_norm(y_BTJC).flatten(1, 2)
        query = rotary(attention.queries(x_BPC), *ctx.of_blocks).unflatten(1, shape)
        key, value = attention.entry(x_BPC)
        own = rotary(key, *ctx.of_blocks).unflatten(1, shape), value.unflatten(1, shape)
        key, value = attention.entry(text_BTC)
        of_tokens = rotary(key, *ctx.of_tokens), value
        mixed = attend_blocks(query, of_tokens, own, ctx.sees)
        return self._after(y_BTJC, mixed)

    def draft(self, layer: int, y_BJC: Tensor, ctx: ForwardContext) -> Tensor:
        """One block after the text of every row, [B, J, C]."""
        x_BJC = self.attention_norm(y_BJC)
        self.read(layer, x_BJC, ctx)
        query = self.attention.queries(x_BJC)
        rotate_in_place(query, ctx.cos, ctx.sin)
        mask = ctx.cache.mask_to_the_end()
        return self._after(y_BJC, ctx.cache.attend(layer, query, mask))

    def read(self, layer: int, x_BPC: Tensor, ctx: ForwardContext) -> None:
        """Write the entries of positions to layer ``layer`` of the cache."""
        key, value = self.attention.entry(x_BPC)
        rotate_in_place(key, ctx.cos, ctx.sin)
        ctx.cache.append(layer, torch.cat((key, value), dim=2))

    def _after(self, y: Tensor, mixed: Tensor) -> Tensor:
        y = y + self.attention.out(mixed.flatten(-2))
        return y + self.feed_forward(self.feed_forward_norm(y))


@dataclass(frozen=True)
class BlockContext:
    """Rotary tables [P, 1, H/2] and the mask of blocks after every token of whole windows.

    Attributes:
        of_tokens, of_blocks: cos and sin of the T tokens, and of the P = T J positions of blocks.
        sees: see :func:`attend_blocks`.
    """

    of_tokens: tuple[Tensor, Tensor]
    of_blocks: tuple[Tensor, Tensor]
    sees: Tensor

    @staticmethod
    def of(ctx: ForwardContext, trunk: TrunkConfig, width: int) -> BlockContext:
        """For blocks of ``width`` positions after the tokens of ``ctx``."""
        cos, sin = block_rotary(trunk, len(ctx.cos), width, like=ctx.cos)
        of_blocks = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return BlockContext((ctx.cos, ctx.sin), of_blocks, ctx.dense_mask())


class DFlashMTP(InnerStates):
    """The mask, the projection of the trunk's states, the layers, and the norm after them."""

    config: DFlashConfig
    one_cache: ClassVar[bool] = True

    def __init__(self, config: DFlashConfig, trunk: TrunkConfig) -> None:
        super().__init__(config, trunk)
        self.cached_blocks = config.blocks
        corrections, self.rescorer = config.build_correction(trunk, 1)
        self.corrections = nn.ModuleList(corrections)
        if not config.depth:
            return
        width, eps = trunk.d_model, trunk.norm_eps
        # A matrix, so that it is initialized like an embedding.
        self.mask = nn.Parameter(torch.empty(1, width))
        self.fuse = Linear(config.n_states * width, width)
        self.text_norm = RMSNorm(width, eps)
        self.layers = nn.ModuleList(BlockLayer(trunk) for _ in range(config.blocks))
        self.norm = RMSNorm(width, eps)

    @property
    def _layers(self) -> list[BlockLayer]:
        return [cast(BlockLayer, layer) for layer in self.layers]

    def reads(self, k: int) -> range:
        return range(1, k + 1 if self.corrections else 2)

    def states(self, inputs: StackInputs, active: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        if not active:
            return
        embedded_BTC = inputs.embedded_at(1)
        if self.config.detach == "all":
            embedded_BTC = embedded_BTC.detach()
        y_BTJC = self._block(embedded_BTC.unsqueeze(2))
        text_BTC = self._text(inputs.branch)
        ctx = BlockContext.of(inputs.ctx, self.trunk_config, self.depth + 1)
        for layer in self._layers:
            y_BTJC = layer(y_BTJC, text_BTC, ctx)
        hidden_BTJC = self.norm(y_BTJC)
        for k in active:
            yield k, self.corrected(k, hidden_BTJC[:, :, k], inputs.tokens_at(k))

    def corrected(self, k: int, hidden: Tensor, before: Tensor) -> Tensor:
        if not self.corrections:
            return hidden
        return hidden + cast(Bigrams, self.corrections[0]).after(before)

    def _block(self, embedded: Tensor) -> Tensor:
        """Embeddings [.., 1, C] with the masks after them, [.., J, C]."""
        masks = self.mask.to(embedded.dtype).expand(*embedded.shape[:-2], self.depth, -1)
        return torch.cat((embedded, masks), dim=-2)

    def _text(self, branch: Tensor) -> Tensor:
        return self.text_norm(self.fuse(branch))

    @property
    def block_width(self) -> int:
        return self.depth + 1

    def read(self, branch_BTX: Tensor, ctx: ForwardContext) -> None:
        text_BTC = self._text(branch_BTX)
        for i, layer in enumerate(self._layers):
            layer.read(i, text_BTC, ctx)

    def draft_block(self, embedded_B1C: Tensor, ctx: ForwardContext) -> Tensor:
        y_BJC = self._block(embedded_B1C)
        for i, layer in enumerate(self._layers):
            y_BJC = layer.draft(i, y_BJC, ctx)
        return self.norm(y_BJC)[:, 1:]

    @torch.no_grad()
    def init_from_trunk(
        self, fresh: Collection[int], trunk: Trunk, head: Head, text: TrunkText | None
    ) -> None:
        """A new drafter's last norm is the trunk's."""
        if fresh:
            self.norm.load_state_dict(trunk.norm.state_dict())

"""Mask tokens with gated LoRA (Samragh et al. 2025, arXiv 2507.11851).

    z^1_t .. z^D_t = Trunk'(x_1 .. x_t, m_1 .. m_D), the states of the D masks after x_t
    W'  = W + B A        for the linear layers of the blocks, at masks alone
    h^k = z^k_t + W_2 SiLU(W_1 [z^k_t ; norm E(x_{t+k})])

and the shared head predicts ``x_{t+k+1}`` from ``h^k``. The *sampler* W_1, W_2 tells a mask the
token that comes at its own place. The mask ``m_k`` after ``x_t`` has the rotary position of
``x_{t+k}``; it attends to the tokens up to ``x_t`` and to the masks ``m_1 .. m_k`` of its block.
B and W_2 start at zero.

The masks are a second pass of the trunk, which reads the keys and values of the first and leaves
it as it is: the main prediction is that of a model without masks, to the last bit. In training,
D masks follow every token, so a step costs about D + 1 passes of the trunk. In decoding, a round
has one pass over D masks, through the trunk's cache, whose entries the next verify pass overwrites.

The *consistency loss* is the mean square of ``z^k_t - h_{t+k}``, where ``h_{t+k}`` is the main
prediction's state for the same token, without a gradient.

Shapes: B batch, T positions, D masks of a block, C d_model, N heads, M key heads, G = N / M, H head
size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_modules.windows import RandomKey
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPConfig, MTPStack
from mtp_lightning.mtp.block_attention import attend_blocks, block_rotary
from mtp_lightning.mtp.inputs import StackInputs
from mtp_lightning.nn.block import Block, eager_blocks, is_compiled
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.linear import Linear, ZeroLinear
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.rope import over_whole_heads
from mtp_lightning.nn.trunk import Trunk
from mtp_lightning.settings import require_number, require_whole

# The layers of a block that have updates; routers and experts have none.
_UPDATED = ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down")


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(MTPConfig, variant="masked"):
    """``mtp=masked``: the trunk itself predicts D tokens at once, at mask tokens.

    Attributes:
        lora_rank: r, columns of B.
        consistency: weight of the consistency loss; 0 for none.
        freeze_trunk: embedding, trunk and head keep their weights, as in the paper.

    Raises:
        UserError: a number is out of range, or :meth:`build` gets a trunk with other attention than
            ``grouped_query``.
    """

    meaning: ClassVar[tuple[str, ...]] = ("lora_rank",)

    lora_rank: int = 16
    consistency: float = 1.0
    freeze_trunk: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("mtp.lora_rank", self.lora_rank, least=1)
        require_number("mtp.consistency", self.consistency, least=0)

    @property
    def n_states(self) -> int:  # type: ignore[override]
        """The states of a block of masks, side by side."""
        return self.depth

    def build(self, trunk: TrunkConfig) -> MaskedMTP:
        if trunk.attention.variant != "grouped_query":
            raise UserError(
                "mtp=masked reads the keys and values of whole heads, which the "
                f"{trunk.attention.variant} attention does not give: use a model with "
                "grouped-query attention, such as model=nano."
            )
        return MaskedMTP(self, trunk)


class Update(nn.Module):
    """``B A x``, the low-rank update of one linear layer (LoRA, Hu et al. 2021)."""

    def __init__(self, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = Linear(n_in, rank), ZeroLinear(rank, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Sampler(nn.Module):
    """Corrects a mask's state, given the token at the mask's position."""

    def __init__(self, trunk: TrunkConfig) -> None:
        super().__init__()
        width = trunk.d_model
        self.norm = RMSNorm(width, trunk.norm_eps)
        self.up, self.down = Linear(2 * width, width), ZeroLinear(width, width)

    def forward(self, z_BTC: Tensor, embedded_BTC: Tensor) -> Tensor:
        both = torch.cat((z_BTC, self.norm(embedded_BTC)), dim=-1)
        return self.down(F.silu(self.up(both)))


class MaskCache:
    """Keys and values of a pass over whole windows, and then the cache of a pass over the masks
    after every token, which are ordered [T, D]: all those after the first token come first.

    Args:
        masks: D.
        sees: bool [1 | B, 1, T, T], True where a token attends to another.
    """

    def __init__(self, masks: int, sees: Tensor) -> None:
        self.masks, self.sees = masks, sees
        self._tokens: dict[int, Tensor] = {}
        self._own_entry: Tensor | None = None

    def keep(self, layer: int, entry_BTMH: Tensor) -> None:
        """Take one layer's keys and values of the tokens."""
        self._tokens[layer] = entry_BTMH

    def append(self, layer: int, entry_BPMH: Tensor) -> None:
        """Take one layer's keys and values of the masks, P = T D, for the next :meth:`attend`."""
        self._own_entry = entry_BPMH.unflatten(1, (-1, self.masks))

    def attend(self, layer: int, query_BPNH: Tensor, mask: None) -> Tensor:
        """Attention of the masks' queries, [B, P, N, H]. All masks after a token attend to the keys
        that the token attends to; each also attends to its own block up to itself."""
        assert self._own_entry is not None
        query = query_BPNH.unflatten(1, (-1, self.masks))
        key, value = self._tokens[layer].chunk(2, dim=2)
        own_key, own_value = self._own_entry.chunk(2, dim=3)
        device = query.device
        sees_own = torch.ones(self.masks, self.masks, dtype=torch.bool, device=device).tril()
        mixed = attend_blocks(query, (key, value), (own_key, own_value), self.sees, sees_own)
        return mixed.flatten(1, 2)


class MaskedMTP(MTPStack):
    """The mask tokens, the updates of the trunk's layers, and the sampler."""

    config: MaskedConfig
    cached_blocks = 0  # the masks read the trunk's own cache

    def __init__(self, config: MaskedConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        self.trunk_config = trunk
        if not config.depth:
            return
        # A matrix, so that it is initialized like an embedding.
        self.masks = nn.Parameter(torch.empty(config.depth, trunk.d_model))
        self.updates = nn.ModuleList()
        with torch.device("meta"):
            blocks = [Block(trunk, layer) for layer in range(trunk.n_layers)]
        for block in blocks:
            shapes = {n: layer.weight.shape for n, layer in _updated(block)}
            self.updates.append(
                nn.ModuleDict({n: Update(k, m, config.lora_rank) for n, (m, k) in shapes.items()})
            )
        self.sampler = Sampler(trunk)

    def through_trunk(
        self, trunk: Trunk, embedded_BTC: Tensor, ctx: ForwardContext, key: RandomKey | None
    ) -> tuple[Tensor, Tensor]:
        batch, seq_len, width = embedded_BTC.shape
        sees = ctx.dense_mask()
        cache = MaskCache(self.depth, sees)
        # Entries and updates, looked up by layer, would compile every block again.
        keep = torch.compiler.disable(cache.keep) if is_compiled(trunk) else cache.keep
        final_BTC = trunk(embedded_BTC, replace(ctx, kv_sink=keep)).final
        masks_BPC = self.masks.to(embedded_BTC.dtype).repeat(batch, seq_len, 1)
        rotary = block_rotary(self.trunk_config, seq_len, self.depth, like=ctx.cos)
        cos, sin = over_whole_heads(*rotary)
        after = ForwardContext(
            cos.unsqueeze(-2), sin.unsqueeze(-2), cache=cache, updates=self._updates(trunk)
        )
        with eager_blocks(trunk):
            z_BPC = trunk(masks_BPC, after).final
        z_BTDC = z_BPC.view(batch, seq_len, self.depth, width)
        if ctx.auxiliary is not None and self.config.consistency and seq_len > 1:
            loss = self.config.consistency * consistency(z_BTDC, final_BTC.detach(), sees)
            ctx.auxiliary.add_loss(loss, "train/consistency_loss")
        return final_BTC, z_BTDC.flatten(2)

    @property
    def appended(self) -> int:
        return self.depth

    def append(self, trunk: Trunk, ctx: ForwardContext) -> Tensor:
        cache = ctx.cache
        assert isinstance(cache, KVCache)
        n_masks = cache.spans.width
        masks_BDC = self.masks[:n_masks].expand(cache.batch_size, -1, -1)
        z_BDC = trunk(masks_BDC, replace(ctx, updates=self._updates(trunk))).final
        return F.pad(z_BDC, (0, 0, 0, self.depth - n_masks)).flatten(1).unsqueeze(1)

    def _updates(self, trunk: Trunk) -> dict[nn.Module, nn.Module]:
        """The updates by the layers that they belong to."""
        by_layer: dict[nn.Module, nn.Module] = {}
        for block, updates in zip(trunk.blocks, self.updates, strict=True):
            by_layer |= {layer: updates[name] for name, layer in _updated(block)}  # type: ignore[index]
        return by_layer

    def reads(self, k: int) -> range:
        return range(k, k + 1)

    def depth_state(self, k: int, inputs: StackInputs, previous_BTC: Tensor) -> Tensor:
        z_BTC = inputs.branch.chunk(self.depth, dim=-1)[k - 1]
        return z_BTC + self.sampler(z_BTC, inputs.embedded_at(k))


def _updated(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a block that have updates, by the last part of their names."""
    layers = dict(block.named_modules())
    for name in _UPDATED:
        if name in layers:
            yield name.rpartition(".")[2], layers[name]


def consistency(z_BTDC: Tensor, target_BTC: Tensor, sees: Tensor) -> Tensor:
    """The consistency loss between the masks' and the tokens' states, summed over the windows; for
    each window, the mean over k of the mean over the k-th masks whose target position lies in the
    window and in the same document (0 if none does). ``sees`` as in :class:`MaskCache`."""
    seq_len, depth = z_BTDC.shape[1:3]
    total = z_BTDC.new_zeros((), dtype=torch.promote_types(z_BTDC.dtype, torch.float32))
    for k in range(1, min(depth, seq_len - 1) + 1):
        apart_BT = (z_BTDC[:, :-k, k - 1] - target_BTC[:, k:]).to(total.dtype).square().mean(-1)
        # Where the token k positions later attends to the one before the masks.
        counts_BT = sees[:, 0].diagonal(-k, 1, 2).to(total.dtype)
        total = total + ((apart_BT * counts_BT).sum(1) / counts_BT.sum(1).clamp(min=1)).sum()
    return total / depth

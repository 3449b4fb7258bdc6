"""Multi-head latent attention (DeepSeek-V2, section 2.1; DeepSeek-V3, eq. 1-11).

Keys and values of all heads are computed from one narrow latent per token; positions enter through
a separate rotary key that all heads share. Decoding stores only the latent and the rotary key.

Shapes: B batch, T positions, C d_model, N heads, H size of a query or key head, R kv_rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtp_lightning.errors import UserError
from mtp_lightning.nn.batch_invariant import by_token
from mtp_lightning.nn.components import AttentionConfig, CacheEntry, check_whole
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.document_attention import MIN_WIDTH
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.ops import attention, rotary
from mtp_lightning.nn.rope import rotate_in_place
from mtp_lightning.settings import require_number


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig(AttentionConfig, variant="latent"):
    """Multi-head latent attention.

    Attributes:
        q_rank: d_c', width of the query latent; None projects queries directly (V2-Lite).
        kv_rank: d_c, width of the latent that keys and values are computed from.
        d_nope: dimensions of a query or key head without position.
        d_rope: dimensions that are rotated by the position, even; the key's are shared by all
            heads.
        d_value: width of a value head.
        norm_eps: epsilon of the norms on the latents; None is the trunk's.

    Raises:
        UserError: a width is not positive, or ``d_rope`` is odd.
    """

    q_rank: int | None
    kv_rank: int
    d_nope: int
    d_rope: int
    d_value: int
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        check_whole("model.attention", self, ("kv_rank", "d_nope", "d_rope", "d_value"))
        if self.q_rank is not None:
            check_whole("model.attention", self, ("q_rank",))
        if self.norm_eps is not None:
            require_number("model.attention.norm_eps", self.norm_eps, least=0)
        if self.d_rope % 2:
            raise UserError(
                f"model.attention.d_rope={self.d_rope} must be even: RoPE rotates pairs of it."
            )

    @property
    def d_head(self) -> int:
        """Width of a query or key head."""
        return self.d_nope + self.d_rope

    @property
    def d_cached(self) -> int:
        """Numbers stored per token in decoding: its latent and its rotary key."""
        return self.kv_rank + self.d_rope

    def reads_blocks(self, trunk: TrunkConfig) -> bool:
        return type(self) is LatentAttentionConfig and min(self.d_head, self.d_value) >= MIN_WIDTH

    def build(self, trunk: TrunkConfig, layer: int | None) -> nn.Module:
        return LatentAttention(trunk, self)

    def head_size(self, trunk: TrunkConfig) -> int:
        if trunk.d_head not in (None, self.d_head):
            raise UserError(
                f"model.d_head={trunk.d_head} must be null, or d_nope + d_rope = {self.d_head} of "
                "model.attention."
            )
        return self.d_head

    def rope_head_dim(self, trunk: TrunkConfig) -> int:
        return self.d_rope

    def check(self, trunk: TrunkConfig) -> None:
        if trunk.n_kv_heads != trunk.n_heads:
            raise UserError(
                f"model.n_kv_heads={trunk.n_kv_heads} must be model.n_heads={trunk.n_heads} with "
                "latent attention: all heads read the same latent."
            )

    def cache_entry(self, trunk: TrunkConfig) -> CacheEntry:
        return CacheEntry(1, self.d_cached, shared=True)


class LatentAttention(nn.Module):
    """The attention layer. In every query and key head, the part without position comes first."""

    def __init__(self, trunk: TrunkConfig, config: LatentAttentionConfig) -> None:
        super().__init__()
        self.n_heads, self.d_head = trunk.n_heads, config.d_head
        self.d_nope, self.d_rope, self.d_value = config.d_nope, config.d_rope, config.d_value
        self.kv_rank, self.q_rank = config.kv_rank, config.q_rank
        queries = trunk.n_heads * config.d_head
        eps = trunk.norm_eps if config.norm_eps is None else config.norm_eps
        if config.q_rank is None:
            self.query = Linear(trunk.d_model, queries)
        else:
            self.query_down = Linear(trunk.d_model, config.q_rank)
            self.query_norm = RMSNorm(config.q_rank, eps)
            self.query_up = Linear(config.q_rank, queries)
        self.kv_down = Linear(trunk.d_model, config.d_cached)
        self.kv_norm = RMSNorm(config.kv_rank, eps)
        self.kv_up = Linear(config.kv_rank, trunk.n_heads * (config.d_nope + config.d_value))
        self.out = Linear(trunk.n_heads * config.d_value, trunk.d_model)
        scaling = trunk.rope_scaling
        self.score_factor = 1.0 if scaling is None else scaling.score_factor

    def forward(self, x_BTC: Tensor, ctx: ForwardContext, layer: int = 0) -> Tensor:
        """[B, T, C] -> [B, T, C]; ``layer`` is this layer's index in ``ctx.cache``."""
        batch, seq_len, _ = x_BTC.shape
        if self.q_rank is None:
            query = self.query(x_BTC)
        else:
            query = self.query_up(self.query_norm(self.query_down(x_BTC)))
        query = query.view(batch, seq_len, self.n_heads, self.d_head)
        query_nope, query_rope = query.split([self.d_nope, self.d_rope], dim=-1)
        query_rope = pairs_to_halves(query_rope)
        latent_BTR, key_rope = self.kv_down(x_BTC).split([self.kv_rank, self.d_rope], dim=-1)
        latent_BTR = self.kv_norm(latent_BTR)
        key_rope = pairs_to_halves(key_rope).unsqueeze(2)
        if ctx.cache is not None:
            return self._decode(query_nope, query_rope, latent_BTR, key_rope, ctx, layer)

        query_rope = rotary(query_rope, ctx.cos, ctx.sin)
        key_rope = rotary(key_rope, ctx.cos, ctx.sin)
        key_value = self.kv_up(latent_BTR).view(batch, seq_len, self.n_heads, -1)
        key_nope, value = key_value.split([self.d_nope, self.d_value], dim=-1)
        query = torch.cat((query_nope, query_rope), dim=-1)
        if self.score_factor != 1.0:
            query = query * self.score_factor
        key = torch.cat((key_nope, key_rope.expand(-1, -1, self.n_heads, -1)), dim=-1)
        mixed = attention(query, key, value, ctx.mask)
        return self.out(mixed.flatten(2))

    def _decode(
        self,
        query_nope: Tensor,
        query_rope: Tensor,
        latent_BTR: Tensor,
        key_rope: Tensor,
        ctx: ForwardContext,
        layer: int,
    ) -> Tensor:
        """Attention over the stored latents, with ``kv_up`` absorbed (V2, section 2.1.2).

        ``q . (W_k c) = (W_k^T q) . c``, and ``sum_j p_j W_v c_j = W_v sum_j p_j c_j``. So the
        single entry [c ; rotary key] of a token serves all heads as key and, without its rotary
        part, as value.
        """
        assert ctx.cache is not None
        rotate_in_place(query_rope, ctx.cos, ctx.sin)
        rotate_in_place(key_rope, ctx.cos, ctx.sin)
        entry = torch.cat((latent_BTR.unsqueeze(2), key_rope), dim=-1)
        ctx.cache.append(layer, entry)
        up = self.kv_up.weight.to(query_nope.dtype).view(
            self.n_heads, self.d_nope + self.d_value, self.kv_rank
        )
        key_up, value_up = up.split([self.d_nope, self.d_value], dim=1)
        query = torch.cat((_by_head(query_nope, key_up), query_rope), dim=-1)
        # The cache scales scores by the entry's width; correct that to the head's width.
        query = query * (self.score_factor * (entry.shape[-1] / self.d_head) ** 0.5)
        mixed = ctx.cache.attend(layer, query, ctx.mask)[..., : self.kv_rank]
        return self.out(_by_head(mixed, value_up.transpose(1, 2)).flatten(2))


def _by_head(x_BTNI: Tensor, weight_NIO: Tensor) -> Tensor:
    """Multiply every head by its own matrix: [B, T, N, I] -> [B, T, N, O]."""
    rows_NMI = x_BTNI.flatten(0, 1).transpose(0, 1)
    product_NMO = by_token(lambda rows: torch.bmm(rows, weight_NIO), rows_NMI, dim=1)
    return product_NMO.transpose(0, 1).reshape(*x_BTNI.shape[:-1], -1)


def pairs_to_halves(x: Tensor) -> Tensor:
    """Reorder [..., H] from rotary pairs (2j, 2j + 1), as in DeepSeek's weights, to (j, j + H/2).

    The same permutation of query and key does not change their product.
    """
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

"""Multi-head latent attention (DeepSeek-V2, section 2.1; DeepSeek-V3, eq. 1-11).

Keys and values of all heads are made of one narrow latent a token; position enters by a rotary key
of its own, which all heads share. Decoding keeps the latent and that key, nothing else.

Names in transformers' DeepseekV3Attention, whose weights fit as they are (HF -> here):
q_proj -> query, q_a_proj -> query_down, q_a_layernorm -> query_norm, q_b_proj -> query_up,
kv_a_proj_with_mqa -> kv_down, kv_a_layernorm -> kv_norm, kv_b_proj -> kv_up, o_proj -> out.

Shapes: B batch, T positions, C d_model, N heads, H size of a query or key head, R kv_rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.causal_attention import causal_attention, fits
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.rope import apply_rope, turn_in_place

# Up to this many tokens are multiplied one at a time when decoding, see _by_head.
_FEW_TOKENS = 16


def pairs_to_halves(x: Tensor) -> Tensor:
    """[..., H] with rotary pairs (2j, 2j + 1), as DeepSeek's weights have them, to (j, j + H/2).

    A permutation that query and key share leaves their product as it is.
    """
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class LatentAttention(nn.Module):
    """In every head of ``query*`` and key the part without position comes first."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        latent = config.latent_attention
        assert latent is not None
        self.n_heads, self.d_head = config.n_heads, latent.d_head
        self.d_nope, self.d_rope, self.d_value = latent.d_nope, latent.d_rope, latent.d_value
        self.kv_rank, self.q_rank = latent.kv_rank, latent.q_rank
        queries = config.n_heads * latent.d_head
        eps = config.norm_eps if latent.norm_eps is None else latent.norm_eps
        if latent.q_rank is None:
            self.query = Linear(config.d_model, queries)
        else:
            self.query_down = Linear(config.d_model, latent.q_rank)
            self.query_norm = RMSNorm(latent.q_rank, eps)
            self.query_up = Linear(latent.q_rank, queries)
        self.kv_down = Linear(config.d_model, latent.kv_rank + latent.d_rope)
        self.kv_norm = RMSNorm(latent.kv_rank, eps)
        self.kv_up = Linear(latent.kv_rank, config.n_heads * (latent.d_nope + latent.d_value))
        self.out = Linear(config.n_heads * latent.d_value, config.d_model)

    def forward(self, x_BTC: Tensor, positions: Positions, layer: int = 0) -> Tensor:
        """[B, T, C] -> [B, T, C]; ``layer`` is this layer's place in ``positions.cache``."""
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
        if positions.cache is not None:
            return self._decode(query_nope, query_rope, latent_BTR, key_rope, positions, layer)

        query_rope = apply_rope(query_rope, positions.cos, positions.sin)
        key_rope = apply_rope(key_rope, positions.cos, positions.sin)
        key_value = self.kv_up(latent_BTR).view(batch, seq_len, self.n_heads, -1)
        key_nope, value = key_value.split([self.d_nope, self.d_value], dim=-1)
        query = torch.cat((query_nope, query_rope), dim=-1)
        key = torch.cat((key_nope, key_rope.expand(-1, -1, self.n_heads, -1)), dim=-1)
        if positions.mask is None and fits(query):
            return self.out(causal_attention(query, key, value).flatten(2))
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=positions.mask, is_causal=positions.mask is None
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _decode(
        self,
        query_nope: Tensor,
        query_rope: Tensor,
        latent_BTR: Tensor,
        key_rope: Tensor,
        positions: Positions,
        layer: int,
    ) -> Tensor:
        """Over the stored latents, with ``kv_up`` absorbed (V2, section 2.1.2).

        ``q . (W_k c) = (W_k^T q) . c``, and ``sum_j p_j W_v c_j = W_v sum_j p_j c_j``: so a token's
        one entry [c ; rotary key] serves all heads as key and, its end cut off, as value.
        """
        assert positions.cache is not None
        turn_in_place(query_rope, positions.cos, positions.sin)
        turn_in_place(key_rope, positions.cos, positions.sin)
        entry = torch.cat((latent_BTR.unsqueeze(2), key_rope), dim=-1)
        positions.cache.append(layer, entry)
        up = self.kv_up.weight.view(self.n_heads, self.d_nope + self.d_value, self.kv_rank)
        key_up, value_up = up.split([self.d_nope, self.d_value], dim=1)
        query = torch.cat((_by_head(query_nope, key_up), query_rope), dim=-1)
        # The cache divides by the root of the entry's width; the head's own is meant.
        query = query * (entry.shape[-1] / self.d_head) ** 0.5
        mixed = positions.cache.attend(layer, query, positions.mask)[..., : self.kv_rank]
        return self.out(_by_head(mixed, value_up.transpose(1, 2)).flatten(2))


def _by_head(x_BTNI: Tensor, weight_NIO: Tensor) -> Tensor:
    """Every head times a matrix of its own: [B, T, N, I] -> [B, T, N, O]."""
    batch, seq_len, n_heads, _ = x_BTNI.shape
    rows_NMI = x_BTNI.flatten(0, 1).transpose(0, 1)
    if batch * seq_len > _FEW_TOKENS or torch.compiler.is_compiling():
        product_NMO = torch.bmm(rows_NMI, weight_NIO)
    else:
        # Drafts must not change a bit of the output: a token is computed as though it were alone.
        product_NMO = torch.cat([torch.bmm(x, weight_NIO) for x in rows_NMI.split(1, 1)], dim=1)
    return product_NMO.transpose(0, 1).reshape(batch, seq_len, n_heads, -1)

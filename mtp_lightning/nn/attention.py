"""Causal grouped-query attention (Ainslie et al. 2023) with rotary positions.

Shapes: B batch, T positions, S stored positions, C d_model, N heads, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.nn.causal_attention import causal_attention, fits
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.ledger import Ledger
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.rope import apply_rope, rope_table, turn_in_place
from mtp_lightning.nn.static_cache import StaticCache


@dataclass(frozen=True)
class Positions:
    """Where the tokens of one pass stand and what they may see; every layer shares it.

    Attributes:
        cos, sin: rotary table, [T, 1, H/2]; with a cache over whole heads, [1 | B, T, 1, H].
        mask: bool [B, 1, T, S], True where a query sees a key; None is plain causal. With a cache,
            what its ``attend`` expects.
        cache: keys and values to append to; None is a pass over whole windows.
        ledger: where layers report what training wants beside their output; None where nobody
            asks.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    cache: KVCache | StaticCache | None = None
    ledger: Ledger | None = None

    @staticmethod
    def of_window(
        config: TrunkConfig,
        seq_len: int,
        *,
        device: torch.device,
        documents: Tensor | None = None,
        ledger: Ledger | None = None,
    ) -> Positions:
        """Positions 0 .. T-1 of whole windows.

        Args:
            config: the trunk's.
            seq_len: T.
            device: of the tables.
            documents: ids [B, T]; a token then sees only its own document.
            ledger: see above.
        """
        positions_T = torch.arange(seq_len, device=device)
        cos, sin = rope_table(positions_T, config.d_rope, config.rope_theta, config.rope_scaling)
        mask = None
        if documents is not None:
            causal = positions_T.unsqueeze(0) <= positions_T.unsqueeze(1)
            same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
            mask = (causal & same).unsqueeze(1)
        return Positions(cos.unsqueeze(-2), sin.unsqueeze(-2), mask, ledger=ledger)

    @staticmethod
    def of_cache(cache: KVCache, starts: list[int], n_new: int) -> Positions:
        """Positions ``start .. start + n_new - 1`` of every row of ``cache``, opened for a pass.

        The table is over whole heads here, for :func:`turn_in_place`: [1 | B, T, 1, H].
        """
        cos, sin, mask = cache.begin(starts, n_new)
        return Positions(cos, sin, mask, cache)

    def repeated(self) -> Positions:
        """For the repetition of this pass under activation recomputation: the same is computed
        (autograd compares), and nothing is reported a second time."""
        return self if self.ledger is None else replace(self, ledger=Ledger(keep=False))


class Attention(nn.Module):
    """Query, key and value are one matrix, in this order; heads lie side by side in each."""

    qkv_bias: nn.Parameter | None

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        assert config.d_head is not None
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.d_head = config.d_head
        self.qkv = Linear(config.d_model, config.qkv_width)
        self.out = Linear(config.attention_width, config.d_model)
        bias = nn.Parameter(torch.zeros(config.qkv_width)) if config.qkv_bias else None
        self.register_parameter("qkv_bias", bias)
        # Of every query and key head before it is turned (Qwen3), one gain for all heads.
        self.query_norm = RMSNorm(config.d_head, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.d_head, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BTC: Tensor, positions: Positions, layer: int = 0) -> Tensor:
        """[B, T, C] -> [B, T, C]; ``layer`` is this layer's place in ``positions.cache``."""
        batch, seq_len, _ = x_BTC.shape
        qkv = self.qkv(x_BTC)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias
        qkv = qkv.view(batch, seq_len, -1, self.d_head)
        if self.query_norm is not None:
            qkv = self._norm_heads(qkv)
        n_turned = self.n_heads + self.n_kv_heads
        if positions.cache is not None:
            turn_in_place(qkv.narrow(2, 0, n_turned), positions.cos, positions.sin)
            query = qkv.narrow(2, 0, self.n_heads)
            cache = positions.cache
            cache.append(layer, qkv.narrow(2, self.n_heads, 2 * self.n_kv_heads))
            mixed = cache.attend(layer, query, positions.mask)
            return self.out(mixed.reshape(batch, seq_len, -1))
        query_key, value = qkv.split([n_turned, self.n_kv_heads], dim=2)
        query_key = apply_rope(query_key, positions.cos, positions.sin)
        query, key = query_key.split([self.n_heads, self.n_kv_heads], dim=2)
        if positions.mask is None and fits(query):
            mixed = causal_attention(query, key, value)
            return self.out(mixed.view(batch, seq_len, -1))
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=positions.mask,
            is_causal=positions.mask is None,
            enable_gqa=self.n_heads != self.n_kv_heads,
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, seq_len, -1))

    def _norm_heads(self, qkv: Tensor) -> Tensor:
        assert self.query_norm is not None and self.key_norm is not None
        sizes = [self.n_heads, self.n_kv_heads, self.n_kv_heads]
        query, key, value = qkv.split(sizes, dim=2)
        return torch.cat((self.query_norm(query), self.key_norm(key), value), dim=2)

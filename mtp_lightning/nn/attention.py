"""Causal grouped-query attention (Ainslie et al. 2023) with rotary positions.

Shapes: B batch, T positions, S stored positions, C d_model, N heads, H head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from mtp_lightning.errors import UserError
from mtp_lightning.nn.components import AttentionConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.document_attention import MIN_WIDTH, block_mask, dense_mask, of_blocks
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.ledger import Ledger
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.ops import rotary_attention
from mtp_lightning.nn.places import Place, renamed
from mtp_lightning.nn.rope import rope_table, turn_in_place
from mtp_lightning.nn.shape import TrunkShape, check_whole
from mtp_lightning.nn.static_cache import StaticCache
from mtp_lightning.nn.tree_cache import Branches, TreeCache
from mtp_lightning.settings import require_bool


@dataclass(frozen=True)
class Positions:
    """Where the tokens of one pass stand and what they may see; every layer shares it.

    Attributes:
        cos, sin: rotary table, [T, 1, H/2]; with a cache over whole heads, [1 | B, T, 1, H].
        mask: bool [B, 1, T, S], True where a query sees a key, or that in blocks; None is plain
            causal. With a cache, what its ``attend`` expects.
        cache: keys and values to append to; None is a pass over whole windows.
        ledger: where layers report what training wants beside their output; None where nobody
            asks.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | BlockMask | None = None
    cache: KVCache | StaticCache | None = None
    ledger: Ledger | None = None

    @staticmethod
    def of_window(
        config: TrunkConfig,
        seq_len: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        documents: Tensor | None = None,
        in_blocks: bool = False,
        ledger: Ledger | None = None,
    ) -> Positions:
        """Positions 0 .. T-1 of whole windows.

        Args:
            config: the trunk's.
            seq_len: T.
            device: of the tables.
            dtype: of the model.
            documents: ids [B, T]; a token then sees only its own document.
            in_blocks: whether that mask may be one for ``document_attention.py``.
            ledger: see above.
        """
        positions_T = torch.arange(seq_len, device=device)
        cos, sin = rope_table(positions_T, **config.rotary, dtype=dtype)
        mask: Tensor | BlockMask | None = None
        if documents is not None:
            in_blocks = in_blocks and config.attention.reads_blocks(config)
            mask = block_mask(documents) if in_blocks else dense_mask(documents)
        return Positions(cos.unsqueeze(-2), sin.unsqueeze(-2), mask, ledger=ledger)

    @staticmethod
    def of_cache(cache: KVCache, starts: list[int], n_new: int) -> Positions:
        """Positions ``start .. start + n_new - 1`` of every row of ``cache``, opened for a pass.

        The table is over whole heads here, for :func:`turn_in_place`: [1 | B, T, 1, H].
        """
        cache.begin(starts, n_new)
        return _OpenPass(cache)

    @staticmethod
    def of_tree(cache: TreeCache, starts: list[int], branches: Branches) -> Positions:
        """Positions of a tree in every row of ``cache``, its first token at ``starts``."""
        cache.begin_tree(starts, branches)
        return _OpenPass(cache)

    def dense_mask(self) -> Tensor | None:
        """``mask`` as a tensor, in whatever form it is."""
        return of_blocks(self.mask) if isinstance(self.mask, BlockMask) else self.mask

    def repeated(self) -> Positions:
        """For the repetition of this pass under activation recomputation: the same is computed
        (autograd compares), and nothing is reported a second time."""
        return self if self.ledger is None else replace(self, ledger=Ledger(keep=False))


class _OpenPass(Positions):
    """A cache's open pass. Tables and mask are made when the first layer asks for them, which
    fused passes never do."""

    def __init__(self, cache: KVCache, **given: Any) -> None:
        """``given`` is what :func:`dataclasses.replace` gives, in place of the cache's own."""
        # Past the setters of a frozen class.
        self.__dict__.update({"ledger": None, **given}, cache=cache, _open=cache)

    _open: KVCache

    @cached_property
    def _angles(self) -> tuple[Tensor, Tensor]:
        return self._open.angles()

    @cached_property
    def cos(self) -> Tensor:  # type: ignore[override]
        return self._angles[0]

    @cached_property
    def sin(self) -> Tensor:  # type: ignore[override]
        return self._angles[1]

    @cached_property
    def mask(self) -> Tensor | None:  # type: ignore[override]
        return self._open.mask()


@dataclass(frozen=True, kw_only=True)
class GroupedQueryConfig(AttentionConfig, variant="grouped_query"):
    """Grouped-query attention: ``n_heads / n_kv_heads`` query heads share a key-value head.

    Attributes:
        qk_norm: RMSNorm on every query and key head before RoPE (Qwen3).
        qkv_bias: a bias on queries, keys and values, which starts at 0 (Qwen2).
        d_rope: dimensions of a query or key head that are turned by its position, even (half of
            them in GLM-4.5); None turns all. Pairs are (j, j + H/2) whatever it is, and the first
            ``d_rope / 2`` of them are turned.

    Raises:
        UserError: ``d_rope`` is no even number of dimensions.
    """

    qk_norm: bool = False
    qkv_bias: bool = False
    d_rope: int | None = None

    def __post_init__(self) -> None:
        for name in ("qk_norm", "qkv_bias"):
            require_bool(f"model.attention.{name}", getattr(self, name))
        if self.d_rope is None:
            return
        check_whole("model.attention", self, ("d_rope",), least=2)
        if self.d_rope % 2:
            raise UserError(
                f"model.attention.d_rope={self.d_rope} must be even: RoPE turns pairs of it."
            )

    def check(self, trunk: TrunkShape) -> None:
        if self.turned_size(trunk) > trunk.d_head:
            raise UserError(
                f"model.attention.d_rope={self.d_rope} is more than a head has, model.d_head="
                f"{trunk.d_head}: lower it, or leave it out to turn all."
            )

    def turned_size(self, trunk: TrunkShape) -> int:
        return trunk.d_head if self.d_rope is None else self.d_rope

    def reads_blocks(self, trunk: TrunkShape) -> bool:
        return type(self) is GroupedQueryConfig and trunk.d_head >= MIN_WIDTH

    def build(self, trunk: TrunkShape, layer: int | None) -> nn.Module:
        return Attention(trunk, self)

    def matrix_params(self, trunk: TrunkShape, layer: int | None) -> int:
        out = trunk.n_heads * trunk.d_head
        return trunk.d_model * (qkv_width(trunk) + out)

    def num_params(self, trunk: TrunkShape, layer: int | None) -> int:
        norms = 2 * trunk.d_head if self.qk_norm else 0
        biases = qkv_width(trunk) if self.qkv_bias else 0
        return self.matrix_params(trunk, layer) + norms + biases

    def hf_places(self, trunk: TrunkShape, layer: int | None) -> Iterator[Place]:
        d_model, d_head = trunk.d_model, trunk.d_head
        heads = {"q": trunk.n_heads, "k": trunk.n_kv_heads, "v": trunk.n_kv_heads}
        rows = {f"{name}_proj": n * d_head for name, n in heads.items()}
        matrices = tuple((f"{name}.weight", (n, d_model)) for name, n in rows.items())
        order, qkv_order = self._orders(trunk)
        yield Place(own="qkv.weight", parts=matrices, order=qkv_order)
        if self.qkv_bias:
            biases = tuple((f"{n}.bias", (w,)) for n, w in rows.items())
            yield Place(own="qkv_bias", parts=biases, order=qkv_order)
        yield renamed("out.weight", "o_proj.weight", (d_model, trunk.n_heads * d_head))
        if self.qk_norm:
            for own, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
                gains = ((f"{theirs}.weight", (d_head,)),)
                yield Place(own=f"{own}.weight", parts=gains, order=order)

    def _orders(self, trunk: TrunkShape) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Where the dimensions of a head lie there, and those of all heads of queries, keys and
        values; None where they lie as here.

        There the pairs are (j, j + R/2) in the first R dimensions, here (j, j + H/2).
        """
        size, turned = trunk.d_head, self.turned_size(trunk)
        if turned == size:
            return None, None
        pairs, moving = size // 2, turned // 2
        order = tuple(
            j + side * moving if j < moving else j + moving + side * (pairs - moving)
            for side in (0, 1)
            for j in range(pairs)
        )
        n_turned = trunk.n_heads + trunk.n_kv_heads
        heads = [head * size + at for head in range(n_turned) for at in order]
        return order, (*heads, *range(n_turned * size, qkv_width(trunk)))


def qkv_width(trunk: TrunkShape) -> int:
    """Output width of the fused query, key and value projection."""
    return (trunk.n_heads + 2 * trunk.n_kv_heads) * trunk.d_head


class Attention(nn.Module):
    """Query, key and value are one matrix, in this order; heads lie side by side in each."""

    qkv_bias: nn.Parameter | None

    def __init__(self, trunk: TrunkShape, config: GroupedQueryConfig) -> None:
        super().__init__()
        self.n_heads = trunk.n_heads
        self.n_kv_heads = trunk.n_kv_heads
        self.d_head = trunk.d_head
        width = qkv_width(trunk)
        self.qkv = Linear(trunk.d_model, width)
        self.out = Linear(trunk.n_heads * trunk.d_head, trunk.d_model)
        bias = nn.Parameter(torch.zeros(width)) if config.qkv_bias else None
        self.register_parameter("qkv_bias", bias)
        # Of every query and key head before it is turned (Qwen3), one gain for all heads.
        self.query_norm = RMSNorm(trunk.d_head, trunk.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(trunk.d_head, trunk.norm_eps) if config.qk_norm else None

    def forward(self, x_BTC: Tensor, positions: Positions, layer: int = 0) -> Tensor:
        """[B, T, C] -> [B, T, C]; ``layer`` is this layer's place in ``positions.cache``."""
        batch, seq_len, _ = x_BTC.shape
        qkv = self.qkv(x_BTC)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias.to(qkv.dtype)  # autocast's, where it is on
        qkv = qkv.view(batch, seq_len, -1, self.d_head)
        if self.query_norm is not None:
            qkv = self._norm_heads(qkv)
        if positions.cache is None:
            mixed = rotary_attention(
                qkv, positions.cos, positions.sin, positions.mask, self.n_heads, self.n_kv_heads
            )
        else:
            n_turned = self.n_heads + self.n_kv_heads
            turn_in_place(qkv.narrow(2, 0, n_turned), positions.cos, positions.sin)
            query, entry = qkv.split([self.n_heads, 2 * self.n_kv_heads], dim=2)
            positions.cache.append(layer, entry)
            mixed = positions.cache.attend(layer, query, positions.dense_mask())
        return self.out(mixed.reshape(batch, seq_len, -1))

    def _norm_heads(self, qkv: Tensor) -> Tensor:
        assert self.query_norm is not None and self.key_norm is not None
        sizes = [self.n_heads, self.n_kv_heads, self.n_kv_heads]
        query, key, value = qkv.split(sizes, dim=2)
        return torch.cat((self.query_norm(query), self.key_norm(key), value), dim=2)

"""What all layers of one pass share: positions, mask, cache, and the collectors of their outputs.

Shapes: B batch, T positions, S stored positions, M key and value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from mtp_lightning.nn.auxiliary import AuxiliaryOutputs
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.document_attention import block_mask, dense_mask, to_dense
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.rope import rope_table

if TYPE_CHECKING:
    from mtp_lightning.nn.tree_cache import Branches, TreeCache


@dataclass(frozen=True)
class ForwardContext:
    """The state that all layers of one pass share: positions and mask of its tokens, the cache, and
    the collectors that layers report to.

    Attributes:
        cos, sin: rotary table, [T, 1, H/2]; with a cache over whole heads, [1 | B, T, 1, H].
        mask: bool [B, 1, T, S], True where a query attends to a key, or the same as a block mask;
            None is causal. With a cache, the mask that its ``attend`` expects.
        cache: keys and values to append to; None for a pass over whole windows.
        auxiliary: collects the layers' auxiliary outputs in training; None for none.
        kv_sink: receives every layer's index and what a cache would hold of a pass over whole
            windows, its rotated keys and values [B, T, M, H], as part of the autograd graph; None
            for none.
        updates: linear layer -> what is added to its output in this pass; None for none.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | BlockMask | None = None
    cache: Any = None
    auxiliary: AuxiliaryOutputs | None = None
    kv_sink: Callable[[int, Tensor], None] | None = None
    updates: Mapping[nn.Module, nn.Module] | None = None

    @staticmethod
    def of_window(
        config: TrunkConfig,
        seq_len: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        documents: Tensor | None = None,
        in_blocks: bool = False,
        auxiliary: AuxiliaryOutputs | None = None,
    ) -> ForwardContext:
        """The context of positions 0 .. ``seq_len`` - 1 of whole windows of a model of ``dtype``.

        Args:
            documents: ids [B, T]; tokens then attend only within their document.
            in_blocks: whether the mask may be a block mask (``document_attention.py``).
        """
        positions_T = torch.arange(seq_len, device=device)
        cos, sin = rope_table(positions_T, **config.rotary, dtype=dtype)
        mask: Tensor | BlockMask | None = None
        if documents is not None:
            in_blocks = in_blocks and config.attention.reads_blocks(config)
            mask = block_mask(documents) if in_blocks else dense_mask(documents)
        return ForwardContext(cos.unsqueeze(-2), sin.unsqueeze(-2), mask, auxiliary=auxiliary)

    @staticmethod
    def of_cache(cache: KVCache, starts: list[int], n_new: int) -> ForwardContext:
        """Open a pass of ``cache`` over the positions ``start .. start + n_new - 1`` of every row,
        with a rotary table for :func:`rotate_in_place`."""
        cache.open(starts, n_new)
        return _OpenPass(cache)

    @staticmethod
    def of_tree(cache: TreeCache, starts: list[int], branches: Branches) -> ForwardContext:
        """Open a pass of ``cache`` over a tree in every row, its first token at ``starts``."""
        cache.open_tree(starts, branches)
        return _OpenPass(cache)

    def dense_mask(self) -> Tensor:
        """The mask as bool [1 | B, 1, T, T], True where a query attends to a key."""
        if self.mask is None:
            size = len(self.cos)
            causal = torch.ones(size, size, dtype=torch.bool, device=self.cos.device).tril()
            return causal[None, None]
        return to_dense(self.mask) if isinstance(self.mask, BlockMask) else self.mask

    def repeated(self) -> ForwardContext:
        """The context for repeating this pass under activation recomputation: layers compute the
        same (autograd compares), but do not report a second time."""
        if self.auxiliary is None and self.kv_sink is None:
            return self
        auxiliary = None if self.auxiliary is None else AuxiliaryOutputs(keep=False)
        kv_sink = None if self.kv_sink is None else lambda layer, entry_BTMH: None
        return replace(self, auxiliary=auxiliary, kv_sink=kv_sink)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """``layer`` of ``x``, with its update."""
        return layer(x) if self.updates is None else layer(x) + self.updates[layer](x)


class _OpenPass(ForwardContext):
    """The open pass of a cache. It computes tables and mask when the first layer reads them. Fused
    passes never read them, and computing them would take a tenth of a small model's round."""

    cache: KVCache

    def __init__(self, cache: KVCache, **fields: Any) -> None:
        """``fields`` are those of :func:`dataclasses.replace`, which replace the cache's own."""
        # Bypasses the setters of a frozen dataclass.
        self.__dict__.update(fields, cache=cache)

    @cached_property
    def _angles(self) -> tuple[Tensor, Tensor]:
        return self.cache.tables.at_each(self.cache.positions)

    @cached_property
    def cos(self) -> Tensor:  # type: ignore[override]
        return self._angles[0]

    @cached_property
    def sin(self) -> Tensor:  # type: ignore[override]
        return self._angles[1]

    @cached_property
    def mask(self) -> Tensor | None:  # type: ignore[override]
        return self.cache.mask()

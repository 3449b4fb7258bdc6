"""A :class:`KVCache` as a compiled pass sees it: positions are inputs, not part of the program.

Shapes: B rows, T new positions, S capacity, N query heads, M vectors of an entry, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_lightning.nn.components import CacheEntry


class StaticCache:
    """Storage of several layers during one pass.

    Every pass reads the whole capacity with a mask, so that one program serves all positions.

    Args:
        entries_L_BSMH: the storage of a :class:`KVCache`, which :meth:`append` writes to.
        positions_BT: positions of the new tokens.
        entry: the layout of a stored entry.
    """

    def __init__(
        self, entries_L_BSMH: Sequence[Tensor], positions_BT: Tensor, entry: CacheEntry
    ) -> None:
        self.entries_L_BSMH = entries_L_BSMH
        self.positions_BT = positions_BT
        self.entry = entry
        batch, capacity = entries_L_BSMH[0].shape[:2]
        device = positions_BT.device
        self._rows_B1 = torch.arange(batch, device=device).unsqueeze(1)
        self._columns_S = torch.arange(capacity, device=device)

    def append(self, layer: int, entry_BTMH: Tensor) -> None:
        """Store one layer's keys and values, with rotary positions applied."""
        entries = self.entries_L_BSMH[layer]
        entries.index_put_((self._rows_B1, self.positions_BT), entry_BTMH.to(entries.dtype))

    def distances(self) -> Tensor:
        """Distance from every stored position to every new token, [B, T, S]; negative if the stored
        position comes later."""
        return self.positions_BT.unsqueeze(-1) - self._columns_S

    def attend(self, layer: int, query_BTNH: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of the new queries over all stored positions: [B, T, N, H].

        The formula is written out so that the compiler can fuse it.

        Args:
            layer: index of the layer in the cache.
            query_BTNH: the new queries.
            mask: additive, [B, T, S]; None is causal.
        """
        keys, values = self.entry.split(self.entries_L_BSMH[layer].transpose(1, 2))
        batch, seq_len, n_heads, d_head = query_BTNH.shape
        n_kv = keys.shape[1]
        # Queries that share a key head become the rows of one matrix product.
        grouped = query_BTNH.view(batch, seq_len, n_kv, -1, d_head).permute(0, 2, 3, 1, 4)
        rows = grouped.reshape(batch, n_kv, -1, d_head)
        scores = (rows @ keys.transpose(-1, -2)) * d_head**-0.5
        scores = scores.view(*grouped.shape[:-1], -1)
        if mask is None:
            scores = scores.masked_fill((self.distances() < 0)[:, None, None], -torch.inf)
        else:
            scores = scores + mask[:, None, None]
        mixed = scores.softmax(-1).flatten(2, 3) @ values
        mixed = mixed.view(batch, n_kv, -1, seq_len, d_head).permute(0, 3, 1, 2, 4)
        return mixed.reshape(batch, seq_len, n_heads, d_head)

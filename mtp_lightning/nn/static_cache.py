"""A :class:`KVCache` as a compiled pass sees it: where tokens stand is data, not program.

Shapes: B rows, T new positions, S capacity, N query heads, M key and value heads together,
G = N / (key heads) queries a key head, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StaticCache:
    """Storage of several layers during one pass.

    Every pass reads the whole capacity, masked: one program then serves all positions.

    Args:
        entries_L_BSMH: a :class:`KVCache`'s own storage, which :meth:`append` writes to.
        positions_BT: where the new tokens stand.
        n_kv_heads: key heads; a value head goes with each, unless ``shared``.
        shared: an entry is key and value at once, as in latent attention.
    """

    def __init__(
        self,
        entries_L_BSMH: Sequence[Tensor],
        positions_BT: Tensor,
        *,
        n_kv_heads: int,
        shared: bool,
    ) -> None:
        self.entries_L_BSMH = entries_L_BSMH
        self.positions_BT = positions_BT
        self.n_kv_heads = n_kv_heads
        self.shared = shared
        batch, capacity = entries_L_BSMH[0].shape[:2]
        device = positions_BT.device
        self._rows_B1 = torch.arange(batch, device=device).unsqueeze(1)
        self._hidden_BTS = torch.arange(capacity, device=device) > positions_BT.unsqueeze(-1)

    def append(self, layer: int, entry_BTMH: Tensor) -> None:
        """Store one layer's turned keys and values."""
        entries = self.entries_L_BSMH[layer]
        entries.index_put_((self._rows_B1, self.positions_BT), entry_BTMH.to(entries.dtype))

    def attend(self, layer: int, query_BTNH: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of the new queries over all that is held: [B, T, N, H]; ``mask`` is not used.

        Written out, so that the compiler can fuse it.
        """
        used_BMSH = self.entries_L_BSMH[layer].transpose(1, 2)
        keys, values = (used_BMSH,) * 2 if self.shared else used_BMSH.split(self.n_kv_heads, dim=1)
        batch, seq_len, n_heads, d_head = query_BTNH.shape
        n_kv = keys.shape[1]
        # Queries that share a key head are rows of one product.
        grouped = query_BTNH.view(batch, seq_len, n_kv, -1, d_head).permute(0, 2, 3, 1, 4)
        rows = grouped.reshape(batch, n_kv, -1, d_head)
        scores = (rows @ keys.transpose(-1, -2)) * d_head**-0.5
        scores = scores.view(*grouped.shape[:-1], -1)
        scores = scores.masked_fill(self._hidden_BTS[:, None, None], -torch.inf)
        mixed = scores.softmax(-1).flatten(2, 3) @ values
        mixed = mixed.view(batch, n_kv, -1, seq_len, d_head).permute(0, 3, 1, 2, 4)
        return mixed.reshape(batch, seq_len, n_heads, d_head)

"""Keys and values of the tokens already read: preallocated, static, rows free of each other.

Shapes: B rows, T new positions, S capacity, P stored positions that a pass reads, N heads,
M vectors of an entry, or its key heads, H head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.kernels.exact import FEW, attend_by_query, is_exact
from mtp_lightning.nn.rope import whole_head_table

# Passes read a multiple of this many positions. Attention over whole vectors of 16 fp32 gives the
# same bits however many masked positions follow.
_ROUND = 16


def _round_up(n: int) -> int:
    return -(-n // _ROUND) * _ROUND


class PositionTables:
    """Rotary angles and causal masks of all positions up to a capacity, computed once.

    Args:
        config: the trunk's.
        capacity: S, positions.
        device: of the tables.
        dtype: of the keys, and of the mask.
    """

    def __init__(
        self,
        config: TrunkConfig,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.capacity = _round_up(capacity)
        self.device = torch.device(device)
        self.dtype = dtype
        positions_S = torch.arange(self.capacity, device=device)
        cos, sin = whole_head_table(
            positions_S, config.d_rope, config.rope_theta, config.rope_scaling, dtype=dtype
        )
        self.cos_S1H, self.sin_S1H = cos.unsqueeze(1), sin.unsqueeze(1)
        # Query j of a pass that starts at n sees columns 0 .. n + j. One wide table holds the mask
        # of every n as a slice.
        self._center = self.capacity
        columns = torch.arange(2 * self.capacity + FEW, device=device)
        rows = torch.arange(FEW, device=device).unsqueeze(1) + self._center
        self._mask_TW = torch.zeros(rows.shape[0], columns.shape[0], device=device, dtype=dtype)
        self._mask_TW.masked_fill_(columns > rows, -math.inf)

    def at(self, start: int, n_new: int) -> tuple[Tensor, Tensor]:
        """Rotary table of one run of positions: views [1, T, 1, H]."""
        place = (start, n_new)
        return self.cos_S1H.narrow(0, *place)[None], self.sin_S1H.narrow(0, *place)[None]

    def mask(self, start: int, n_new: int, width: int) -> Tensor:
        """Additive mask [T, P] of queries that start at ``start`` over ``width`` positions."""
        if n_new <= FEW:
            return self._mask_TW.narrow(0, 0, n_new).narrow(1, self._center - start, width)
        return self.mask_of(torch.arange(start, start + n_new, device=self.device), width)

    def mask_of(self, positions: Tensor, width: int) -> Tensor:
        """Additive mask [..., P] of queries at ``positions`` [...]."""
        hidden = torch.arange(width, device=self.device) > positions.unsqueeze(-1)
        return torch.zeros(hidden.shape, device=self.device, dtype=self.dtype).masked_fill_(
            hidden, -math.inf
        )


class KVCache:
    """Storage of ``n_layers`` attention layers.

    The caller says where every row's new positions start. So dropping a rejected draft only means
    to start earlier: what lies behind is overwritten before it can be read.

    Args:
        config: the trunk's, for the heads.
        tables: angles and masks; their capacity is the cache's.
        n_layers: attention layers that write here.
        batch_size: B, rows.
    """

    def __init__(
        self,
        config: TrunkConfig,
        tables: PositionTables,
        *,
        n_layers: int,
        batch_size: int,
    ) -> None:
        self.tables = tables
        self.entry = config.attention.cache_entry(config)
        self.grouped = config.n_heads != self.entry.n_kv_heads
        shape = (batch_size, tables.capacity, self.entry.n_vectors, self.entry.width)
        self.entries_L_BSMH = [
            torch.zeros(shape, dtype=tables.dtype, device=tables.device) for _ in range(n_layers)
        ]
        self.lengths = [0] * batch_size
        self._starts = [0] * batch_size
        self._n_new = self._width = 0
        self._place: Tensor | None = None
        self._views: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    @property
    def batch_size(self) -> int:
        """Rows held."""
        return len(self.lengths)

    def row(self, row: int) -> KVCache:
        """A cache of one row that shares this one's storage."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view.entries_L_BSMH = [entries[row : row + 1] for entries in self.entries_L_BSMH]
        view.lengths = [self.lengths[row]]
        view._views = {}
        return view

    def drop_row(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = self.batch_size - 1
        if row != last:
            for entries in self.entries_L_BSMH:
                entries[row].copy_(entries[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.entries_L_BSMH = [entries[:last] for entries in self.entries_L_BSMH]
        self._views = {}

    def begin(self, starts: list[int], n_new: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Open a pass over ``n_new`` positions of every row, the first of them at ``starts``.

        Returns:
            Rotary tables cos, sin [1 | B, T, 1, H], and the mask for :meth:`attend`.

        Raises:
            UserError: a row would outgrow the cache.
        """
        longest = max(starts) + n_new
        if longest > self.tables.capacity:
            raise UserError(
                f"{longest} tokens do not fit into a cache of {self.tables.capacity}: "
                "shorten the prompt, or ask for fewer new tokens."
            )
        assert len(starts) == self.batch_size
        assert all(start <= held for start, held in zip(starts, self.lengths, strict=True))
        self.lengths = [start + n_new for start in starts]
        self._n_new = n_new
        self._width = _round_up(longest)
        self._starts = starts
        if len(starts) == 1 or all(start == starts[0] for start in starts):
            self._place = None
            cos, sin = self.tables.at(starts[0], n_new)
            if starts[0] == 0 and n_new > FEW:
                return cos, sin, None
            return cos, sin, self.tables.mask(starts[0], n_new, self._width)
        device = self.tables.device
        start_B1 = torch.tensor(starts, device=device).unsqueeze(1)
        positions_BT = start_B1 + torch.arange(n_new, device=device)
        # Into rows and positions as one axis: by one index, storing is several times faster.
        first_B1 = torch.arange(len(starts), device=device).unsqueeze(1) * self.tables.capacity
        self._place = (first_B1 + positions_BT).flatten()
        flat = positions_BT.flatten()
        shape = (*positions_BT.shape, 1, -1)
        cos = self.tables.cos_S1H.index_select(0, flat).view(shape)
        sin = self.tables.sin_S1H.index_select(0, flat).view(shape)
        return cos, sin, self.tables.mask_of(positions_BT, self._width)

    def append(self, layer: int, entry_BTMH: Tensor) -> None:
        """Store one layer's turned keys and values, [B, T, M, H], at the open pass's positions."""
        entries = self.entries_L_BSMH[layer]
        if self._place is None:
            entries.narrow(1, self._starts[0], self._n_new).copy_(entry_BTMH)
        else:
            entry = entry_BTMH.flatten(0, 1).to(entries.dtype)
            entries.flatten(0, 1).index_copy_(0, self._place, entry)

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, N, P, H], for a pass of one row's few queries [T, N, P, H].

        Views; made once for as long as the width stays the same.
        """
        copies = self._n_new if self.batch_size == 1 and is_exact() else 1
        key = (self._width, copies)
        if key not in self._views:
            if len(self._views) > 2 * FEW:
                self._views.clear()
            views = []
            for entries in self.entries_L_BSMH:
                used = entries.narrow(1, 0, self._width).transpose(1, 2)
                keys, values = self.entry.split(used)
                if copies > 1:
                    keys, values = (x.expand(copies, -1, -1, -1) for x in (keys, values))
                views.append((keys, values))
            self._views[key] = views
        return self._views[key][layer]

    def distances(self) -> Tensor:
        """How far before every query of the open pass every stored position lies, [B, T, P]; below
        0 it lies behind. For layers that see less than all that came before."""
        device = self.tables.device
        positions_BT = torch.tensor(self._starts, device=device).unsqueeze(1) + torch.arange(
            self._n_new, device=device
        )
        return positions_BT.unsqueeze(-1) - torch.arange(self._width, device=device)

    def attend(self, layer: int, query_BTNH: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of the open pass's queries over all that its rows hold: [B, T, N, H].

        Args:
            layer: which of the cache's.
            query_BTNH: the new queries.
            mask: what :meth:`begin` gave, or another additive one, [B, T, P].
        """
        key_BMPH, value_BMPH = self._read(layer)
        if is_exact():
            assert mask is not None
            return attend_by_query(query_BTNH, key_BMPH, value_BMPH, mask, grouped=self.grouped)
        if mask is None:
            n_new = query_BTNH.shape[1]
            key_BMPH, value_BMPH = key_BMPH[:, :, :n_new], value_BMPH[:, :, :n_new]
        elif mask.dim() == 3:
            mask = mask.unsqueeze(1)
        return F.scaled_dot_product_attention(
            query_BTNH.transpose(1, 2),
            key_BMPH,
            value_BMPH,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.grouped,
        ).transpose(1, 2)

"""Keys and values of the tokens already read: preallocated storage with independent rows.

Shapes: B rows, T new positions, S capacity, P stored positions that a pass reads, N heads,
M vectors of an entry, or its key heads, H head size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.nn.batch_invariant import MAX_VERIFY_WIDTH, is_batch_invariant
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.ops import attention
from mtp_lightning.nn.position_tables import PositionTables, Spans, round_up
from mtp_lightning.runtime import threads


class KVCache:
    """Storage of ``n_layers`` attention layers, of the tables' capacity, and at most ``batch_size``
    rows; :meth:`resize` sets the number in use. Without layers it tracks only the rows' positions.

    The caller decides where every row's new positions start. So it drops a rejected draft by
    starting the next pass earlier: later entries are overwritten before they can be read.
    """

    def __init__(
        self, config: TrunkConfig, tables: PositionTables, *, n_layers: int, batch_size: int
    ) -> None:
        self.tables = tables
        self.entry = config.attention.cache_entry(config)

        shape = (batch_size, tables.capacity, self.entry.n_vectors, self.entry.width)
        self._stored = [
            torch.zeros(shape, dtype=tables.dtype, device=tables.device) for _ in range(n_layers)
        ]
        self.entries_L_BSMH = self._stored
        self.lengths = [0] * batch_size
        self.spans = Spans(tables, [0] * batch_size, 0)  # the positions of the open pass
        self._width = 0
        self._forget()

    def _forget(self) -> None:
        """Drop what is kept about the storage of the rows in use."""
        self.derived: dict[Hashable, Any] = {}  # what a fused pass keeps about it
        self._views: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    @property
    def batch_size(self) -> int:
        """Number of rows in use."""
        return len(self.lengths)

    @property
    def parents(self) -> Sequence[int] | None:
        """The index of each token's parent in the tree of the open pass, -1 for the first token;
        None if the tokens form a chain."""
        return None

    def rows(self, rows: slice) -> Self:
        """A cache of some rows that shares this one's storage."""
        view = copy(self)
        view.entries_L_BSMH = [entries[rows] for entries in self.entries_L_BSMH]
        view.lengths = self.lengths[rows]
        view._forget()
        return view

    def resize(self, batch_size: int) -> None:
        """Use the first ``batch_size`` rows; added rows have read nothing."""
        slots = self._stored[0].shape[0] if self._stored else batch_size
        assert batch_size <= slots
        whole = batch_size == slots
        self.entries_L_BSMH = self._stored if whole else [s[:batch_size] for s in self._stored]
        self.lengths = (self.lengths + [0] * batch_size)[:batch_size]
        self._forget()

    def drop_row(self, row: int) -> None:
        """Drop a row; the last row moves to its slot."""
        last = self.batch_size - 1
        if row != last and (length := self.lengths[last]):
            for entries in self._stored:
                entries[row, :length] = entries[last, :length]
        self.lengths[row] = self.lengths[last]
        self.resize(last)

    def grown(self, tables: PositionTables) -> Self:
        """A copy with the capacity of larger tables; this cache stays as it was."""
        grown, more = copy(self), tables.capacity - self.tables.capacity
        grown._stored = [F.pad(stored, (0, 0, 0, 0, 0, more)) for stored in self._stored]
        grown.tables = tables
        # The open pass's positions index storage of the old capacity.
        grown.spans = Spans(tables, [0], 0)
        grown.resize(self.batch_size)
        return grown

    def open(self, starts: list[int], n_new: int) -> None:
        """Open a pass over ``n_new`` positions of every row, the first of them at ``starts``.

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
        assert all(0 <= start <= length for start, length in zip(starts, self.lengths, strict=True))
        self.lengths = [start + n_new for start in starts]
        self.spans = Spans(self.tables, starts, n_new)
        self._width = round_up(longest)

    @property
    def positions(self) -> Tensor:
        """Positions of the open pass's tokens, [1 | B, T]."""
        return self.spans.positions

    def mask(self) -> Tensor | None:
        """The open pass's mask for :meth:`attend`, [1 | B, T, P]."""
        spans = self.spans
        if spans.uniform and spans.starts[0] == 0 and spans.width > MAX_VERIFY_WIDTH:
            return None
        return self.tables.mask_of(self.positions, self._width)

    def mask_to_the_end(self) -> Tensor:
        """A mask for :meth:`attend`, [1 | B, 1, P]: every token of the open pass attends to all of
        them, and to all positions before."""
        return self.tables.mask_of(self.positions[:, -1:], self._width)

    def append(self, layer: int, entry_BTMH: Tensor) -> None:
        """Store one layer's rotated keys and values, [B, T, M, H], at the open pass's positions.

        Raises:
            UserError: the cache has no such layer.
        """
        if layer >= (n := len(self.entries_L_BSMH)):
            raise UserError(
                f"A depth stores keys of its layer {layer} (from 0), and its stack has "
                f"cached_blocks={n}: set it to the number of attention layers of a depth."
            )
        self.spans.write(self.entries_L_BSMH[layer], entry_BTMH)

    def _keys_and_values(self, layer: int, n_queries: int) -> tuple[Tensor, Tensor]:
        """Views of keys and values [B, M, P, H], kept by width; for a single row in a
        batch-invariant pass, expanded to [T, M, P, H]."""
        copies = n_queries if self.batch_size == 1 and is_batch_invariant() else 1
        key = self._width, copies
        if key not in self._views:
            if len(self._views) > 2 * MAX_VERIFY_WIDTH:
                self._views.clear()
            views = []
            for entries in self.entries_L_BSMH:
                stored = entries.narrow(1, 0, self._width).transpose(1, 2)
                keys, values = self.entry.split(stored)
                if copies > 1:
                    keys, values = (x.expand(copies, -1, -1, -1) for x in (keys, values))
                views.append((keys, values))
            self._views[key] = views
        return self._views[key][layer]

    def distances(self) -> Tensor:
        """Distance from every stored position to every query of the open pass, [B, T, P]; negative
        if the stored position comes later. For layers with a limited window."""
        positions_BT = self.positions.expand(self.batch_size, -1)
        return positions_BT.unsqueeze(-1) - self.tables.columns_S[: self._width]

    def attend(self, layer: int, query_BTNH: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of the open pass's queries over all stored positions: [B, T, N, H]. ``mask`` is
        the result of :meth:`mask`, or another additive mask [B, T, P]."""
        key_BMPH, value_BMPH = self._keys_and_values(layer, query_BTNH.shape[1])
        if is_batch_invariant():
            assert mask is not None
            return attend_by_query(query_BTNH, key_BMPH, value_BMPH, mask)
        if mask is None:
            n_new = query_BTNH.shape[1]
            key_BMPH, value_BMPH = key_BMPH[:, :, :n_new], value_BMPH[:, :, :n_new]
        elif mask.dim() == 3:
            mask = mask.unsqueeze(1)
        # The plain formula: registered kernels compute whole windows and round differently.
        return attention.plain(
            query_BTNH, key_BMPH.transpose(1, 2), value_BMPH.transpose(1, 2), mask
        )


def attend_by_query(
    query_BTNH: Tensor, key_BMPH: Tensor, value_BMPH: Tensor, mask: Tensor
) -> Tensor:
    """Batch-invariant attention over a cache: every query is computed alone. [B, T, N, H].

    PyTorch's CPU kernel rounds differently for several queries at a time, and on its second thread.
    So every query is a batch entry or head of its own, on one thread, which costs a few
    microseconds per layer. Keys and values of a single row are expanded to [T, M, P, H]; the mask
    is additive, [T, P] or [B, T, P].
    """
    batch, n_new, n_heads, d_head = query_BTNH.shape
    if batch == 1:
        # The queries become batch entries that share their keys: [T, 1, N, H].
        query, mask = query_BTNH.transpose(0, 1), mask.reshape(n_new, 1, 1, -1)
    else:
        # The queries become heads: [B, 1, N T, H], those of the same key head adjacent.
        query = query_BTNH.transpose(1, 2).reshape(batch, 1, n_heads * n_new, d_head)
        mask_BNTP = mask.expand(batch, n_new, -1).unsqueeze(1).expand(-1, n_heads, -1, -1)
        mask = mask_BNTP.reshape(batch, n_heads * n_new, 1, -1)
    with threads(1):
        mixed = attention.plain(query, key_BMPH.transpose(1, 2), value_BMPH.transpose(1, 2), mask)
    if batch == 1:
        return mixed.transpose(0, 1)
    return mixed.reshape(batch, n_heads, n_new, -1).transpose(1, 2)

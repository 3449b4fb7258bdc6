"""A cache for passes whose new tokens form a tree: each follows its parent in the tree.

A token at depth e of the tree has a position e after the first token's. It attends to the entries
stored before the pass, to its ancestors and to itself. Entries are stored in the order of the
tokens until :meth:`TreeCache.keep_path` moves those of one path to their positions.

Shapes: B rows, T new tokens, E tokens of a path, P stored positions that a pass reads, N heads,
M vectors of an entry, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_lightning.nn.batch_invariant import is_batch_invariant
from mtp_lightning.nn.kv_cache import KVCache, attend_by_query
from mtp_lightning.nn.position_tables import Spans


class Branches:
    """The tree of the tokens of a pass."""

    def __init__(self, parents: Sequence[int], device: torch.device) -> None:
        # For every token the index of its parent, which is smaller; -1 for a token without one,
        # such as the first.
        self.parents = tuple(parents)
        self.width = width = len(parents)
        paths: list[list[int]] = []
        for token, parent in enumerate(parents):
            assert parent < token
            paths.append([*(paths[parent] if parent >= 0 else []), token])
        # Depth of every token.
        self.offsets_T = torch.tensor([len(path) - 1 for path in paths], device=device)
        # Columns: the entries stored before the pass, its tokens, the positions after it.
        sees_TW = torch.zeros(width, width + 2, dtype=torch.bool)
        for token, path in enumerate(paths):
            sees_TW[token, [0, *(ancestor + 1 for ancestor in path)]] = True
        self.sees_TW = sees_TW.to(device)
        leaves = sorted(path for path in paths if path[-1] not in parents)
        # The paths to all leaves in order, each without the tokens that it shares with the path
        # before: the offset of its first own token, and its tokens' indices.
        self.tails: list[tuple[int, Tensor]] = []
        before: list[int] = []
        for path in leaves:
            shared = sum(a == b for a, b in zip(path, before, strict=False))
            self.tails.append((shared, torch.tensor(path[shared:], device=device)))
            before = path


class TreeCache(KVCache):
    """A :class:`KVCache` whose passes may read a tree of tokens."""

    _branches: Branches | None = None

    @property
    def parents(self) -> Sequence[int] | None:
        return None if self._branches is None else self._branches.parents

    def open(self, starts: list[int], n_new: int) -> None:
        self._branches = None
        super().open(starts, n_new)

    def open_tree(self, starts: list[int], branches: Branches) -> None:
        """Open a pass over the same tree in every row, its first token at ``starts``; see
        :meth:`open`."""
        super().open(starts, branches.width)
        self._branches = branches
        self._new_entries: dict[int, Tensor] = {}
        self._tails: list[tuple[Spans, Tensor]] = []

    def _starts_B1(self) -> Tensor:
        return torch.tensor(self.spans.starts, device=self.tables.device).unsqueeze(1)

    @property
    def positions(self) -> Tensor:
        if self._branches is None:
            return super().positions
        return self._starts_B1() + self._branches.offsets_T

    def mask(self) -> Tensor | None:
        branches, tables = self._branches, self.tables
        if branches is None:
            return super().mask()
        if is_batch_invariant():
            return tables.mask_of(self.positions, self._width)
        places = tables.columns_S[: self._width] - self._starts_B1() + 1
        sees_BTP = branches.sees_TW[:, places.clamp_(0, branches.width + 1)].transpose(0, 1)
        return torch.where(sees_BTP, tables.visible, tables.hidden)

    def append(self, layer: int, entry_BTMH: Tensor) -> None:
        super().append(layer, entry_BTMH)
        if self._branches is not None:
            self._new_entries[layer] = entry_BTMH

    def attend(self, layer: int, query_BTNH: Tensor, mask: Tensor | None) -> Tensor:
        """See :meth:`KVCache.attend`. In a batch-invariant pass, each path is computed with its
        entries at the positions of a chain, so that every token has the bits of a pass over its own
        path alone."""
        if self._branches is None or not is_batch_invariant():
            return super().attend(layer, query_BTNH, mask)
        assert mask is not None
        entries, new_entries = self.entries_L_BSMH[layer], self._new_entries[layer]
        mask = mask.expand(query_BTNH.shape[0], -1, -1)
        starts = self.spans.starts
        self._tails = self._tails or [  # by the first layer
            (Spans(self.tables, [start + first for start in starts], len(index)), index)
            for first, index in self._branches.tails
        ]
        mixed = query_BTNH.new_empty(*query_BTNH.shape[:3], self.entry.width)
        for spans, index in self._tails:
            spans.write(entries, new_entries.index_select(1, index))
            mixed_path = attend_by_query(
                query_BTNH.index_select(1, index),
                *self._keys_and_values(layer, len(index)),
                mask.index_select(1, index),
            )
            mixed.index_copy_(1, index, mixed_path)
        return mixed

    def keep_path(self, path_BE: Tensor) -> None:
        """Keep one path of the last pass's tree in every row: the indices of its tokens, the tree's
        first token first; indices after a path's end are arbitrary."""
        tree_spans, spans = self.spans, Spans(self.tables, self.spans.starts, path_BE.shape[1])
        for layer, entries in enumerate(self.entries_L_BSMH):
            # Fused passes do not call append: their entries are read from the storage.
            entry = self._new_entries.pop(layer, None)
            entry = tree_spans.read(entries) if entry is None else entry
            spans.write(entries, along(entry, path_BE))


def along(values: Tensor, path_BE: Tensor) -> Tensor:
    """The values of the tokens of a path: [B, T, ..] -> [B, E, ..]."""
    batch, width = values.shape[:2]
    first_B1 = torch.arange(batch, device=path_BE.device).unsqueeze(1) * width
    values_E = values.flatten(0, 1).index_select(0, (path_BE + first_B1).flatten())
    return values_E.view(*path_BE.shape, *values.shape[2:])

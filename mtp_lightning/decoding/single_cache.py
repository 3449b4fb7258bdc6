"""Recursive drafting with one module and one cache (EAGLE, arXiv 2401.15077, section 3.1).

A recursive module treats its own output as the true state: after k - 1 drafts, its state for
position i stands in for the trunk's state at i + k - 1. Draft k is the module's first depth there,

    h^k = norm(Block(W [enorm Emb(draft_{i+k}) ; hnorm h^(k-1)])) at position i + k - 1

The cache then holds the entries of all true positions up to i, followed by those of the drafts.
The next round overwrites the drafts' entries from true states. Every draft after the first is a
pass over one position. With one cache per depth (:class:`Session`), a pass also recomputes the
positions accepted since the last round, at the positions used in training.

Shapes: B rows, C d_model, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from mtp_lightning.decoding.session import Session
from mtp_lightning.nn.attention import Positions


class SingleCacheSession(Session):
    """A :class:`Session` of a one-module stack, whose drafts all use the first depth's cache."""

    @staticmethod
    def depths_kept(max_draft: int) -> int:
        return min(max_draft, 1)

    def _draft(self, k: int) -> Tensor:
        if k == 1:
            return super()._draft(k)
        assert self.newest_B1C is not None
        starts = [max(n, 1) + k - 2 for n in self.n]
        cache = self.depth_caches[0]
        positions = Positions.of_cache(cache, starts, 1)
        tokens = cache.runs.read(self.tokens_BS, 1)
        newest = self.newest_B1C
        return self._store_draft(k, self.model.depth_state(1, newest, newest, tokens, positions))

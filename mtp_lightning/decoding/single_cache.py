"""Drafting again and again with one module and one cache (EAGLE, arXiv 2401.15077, section 3.1).

A module that reads its own output can be taken at its word: its state for position i after k - 1
drafts stands for the true state at i + k - 1. Draft k is then the module's first depth there,

    h^k = norm(Block(W [enorm Emb(draft_{i+k}) ; hnorm h^(k-1)])) at position i + k - 1

behind the entries of all true positions up to i and those of the drafts since, in one cache. What
the drafts left there is overwritten in the next round, from true states. Every draft beyond the
first is a pass of one position, whatever was accepted before; with a cache for each depth
(:class:`Session`) a pass catches up with what was, at positions that training had.

Shapes: B rows, C d_model, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from mtp_lightning.decoding.session import Session
from mtp_lightning.mtp.base import BranchPoint
from mtp_lightning.nn.attention import Positions


class SingleCacheSession(Session):
    """A :class:`Session` of a stack of one module, whose drafts share the first depth's cache."""

    @staticmethod
    def depths_kept(max_draft: int) -> int:
        return min(max_draft, 1)

    def draft(self, k: int) -> Tensor:
        if k == 1:
            return super().draft(k)
        assert self.newest_B1C is not None
        starts = [max(n, 1) + k - 2 for n in self.n]
        cache = self.depth_caches[0]
        positions = Positions.of_cache(cache, starts, 1)
        tokens = cache.runs.read(self.tokens_BS, 1)
        at = BranchPoint(
            hidden=self.newest_B1C,
            tokens=tokens,
            embedded=self.model.trunk.embedding(tokens),
            positions=positions,
            first=1,
            head=self.model.head,
        )
        return self._said(k, self.model.mtp.depth_state(1, at, at.hidden))

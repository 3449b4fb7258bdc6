"""Drafts of a stack that computes all depths in one pass over a block of positions after the text
(:attr:`MTPStack.block_width`).

Shapes: B rows, D drafts, C d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtp_lightning.model import MTPModel
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.kv_cache import KVCache


class BlockDrafts:
    """The states of a block's first ``n_drafts`` depths, which drafts are predicted from by
    ``head``."""

    _states_BDC: Tensor
    _logits_BDV: Tensor | None

    def __init__(self, model: MTPModel, head: Head, n_drafts: int) -> None:
        self._model, self._head, self._n_drafts = model, head, n_drafts

    def read(self, cache: KVCache, newest_B1: Tensor, n_read: Sequence[int]) -> None:
        """The pass after texts of ``n_read`` tokens, whose entries ``cache`` has, and one more,
        ``newest_B1``. The next round overwrites its entries."""
        stack = self._model.mtp
        ctx = ForwardContext.of_cache(cache, list(n_read), stack.block_width)
        block_BDC = stack.draft_block(self._model.trunk.embedding(newest_B1), ctx)
        self._states_BDC = block_BDC[:, : self._n_drafts]
        # States that depend on no draft go through the head together, which reads it once.
        alone = stack.ahead(self._n_drafts) > 1
        self._logits_BDV = None if alone else self._head(stack.head_input(self._states_BDC))

    def depth(self, k: int) -> tuple[Tensor, Tensor | None]:
        """The state [B, 1, C] of depth ``k``, before :meth:`MTPStack.corrected`, and its logits
        [B, V] if it depends on no draft."""
        logits_BV = None if self._logits_BDV is None else self._logits_BDV[:, k - 1]
        return self._states_BDC[:, k - 1 : k], logits_BV

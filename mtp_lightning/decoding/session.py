"""The depths' part of decoding: their caches and hidden states, and the passes that draft.

Depth k's cache entry at position i depends on the tokens up to i + k. The entry is *true* once
those are accepted; ``filled[k][row]`` counts the true entries, and the next pass of that depth
starts there. So the cache of every module holds true hidden states and tokens at accepted
positions, and a rejected draft only makes the next pass of its depth one position longer. A depth
without attention reads no earlier position, and skips those of a prompt.

Shapes: B rows, T new positions, S capacity, C d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, groupby
from operator import sub
from typing import NamedTuple

from torch import Tensor

from mtp_lightning.decoding.block import BlockDrafts
from mtp_lightning.decoding.trunk_session import TrunkSession, at
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.batch_invariant import passes_over
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.position_tables import Spans


class DepthDraft(NamedTuple):
    """The values that one depth drafts from: the logits of the tokens that can be drafted, and the
    model's estimate of the probability that the draft is accepted, None without
    ``objective.confidence``."""

    logits_BV: Tensor
    confidence_B: Tensor | None = None


class Session(TrunkSession):
    """A :class:`TrunkSession` whose depths draft.

    A recursive module with one cache treats its own output as the true state (EAGLE, arXiv
    2401.15077, section 3.1): after k - 1 drafts, its state for position i stands in for the trunk's
    state at i + k - 1, and draft k is its first depth there. The cache then holds the entries of
    all true positions, followed by those of the drafts, which the next round overwrites. Every
    draft after the first is a pass over one position. With a cache per depth, a pass also
    recomputes the positions accepted since the last round, at the positions used in training.

    Args:
        max_draft: deepest draft that will be asked for.
        draft_vocab: drafts are chosen among this many first token ids; None is all.
        one_cache: force one cache for all drafts, even if the stack supports one per depth.
        most_accepted: most drafts that a round accepts, if more than ``max_draft``.
    """

    def __init__(
        self,
        model: MTPModel,
        *,
        slots: int,
        capacity: int,
        max_draft: int,
        draft_vocab: int | None = None,
        one_cache: bool = False,
        most_accepted: int = 0,
    ) -> None:
        self._stack = stack = model.mtp
        self.max_draft = max_draft
        self.most_accepted = max(max_draft, most_accepted)
        # The verify pass also gives the branch states, unless the stack runs a pass of its own.
        self._keeps_branch = max_draft > 0 and not stack.appended
        super().__init__(model, slots=slots, capacity=capacity)
        self.filled = [[] for _ in range(max_draft + 1)]
        self._one_cache = one_cache or stack.one_cache
        n_caches = min(max_draft, 1) if self._one_cache else max_draft
        self.depth_caches = [self._new_cache(stack.cached_blocks, slots) for _ in range(n_caches)]
        weight, d_model = model.trunk.embedding.weight, model.config.trunk.d_model
        widths = [stack.config.n_states * d_model, *[stack.state_width(d_model)] * max_draft]
        self._states = [weight.new_zeros(*self._tokens.shape, n) for n in widths[:n_caches]]
        self._draft_head = model.head_of(1)
        if draft_vocab is not None:
            # Reading the head's weight takes most of the time of a small module's draft. Byte-pair
            # ids are numbered by their merges, the most frequent first, so that a sixth of the rows
            # covers nine tokens of ten (the idea of FR-Spec, Zhao et al. 2025, arXiv 2502.14856).
            whole, n, passes = model.head.weight, draft_vocab, self._fused
            first = whole.detach()[:n] if passes is None else passes.first_rows(whole, n)
            self._draft_head = Head(n, d_model, tied=first)
        self._fused_drafts = [
            None if self._fused is None else self._fused.draft(k, self._draft_head.weight)
            for k in range(1, n_caches + 1)
        ]
        self._n_drafted = 0  # depths that have drafted since the last `accept`
        # The hidden state that each row's newest draft was predicted from.
        self.newest_B1C: Tensor | None = None
        has_block = stack.block_width > 0
        self._block = BlockDrafts(model, self._draft_head, max_draft) if has_block else None
        self.resize(0)

    @property
    def _widest(self) -> int:
        return max(self.most_accepted + 1, self._stack.block_width)

    def draft(self, k: int) -> DepthDraft:
        """Bring depth ``k`` up to date and predict the token ``k`` positions after the pending one.
        The shallower depths must be up to date, and their drafts in the token buffer."""
        stack, confidence_B = self._stack, None
        newest_B1C, logits_BV = self._newest_states(k)
        if self._block is not None:
            newest_B1C = stack.corrected(k, newest_B1C, self._before(k))
        self.newest_B1C, self._n_drafted = newest_B1C, k
        state_B1C = stack.head_input(newest_B1C)
        state_BC = state_B1C[:, 0]
        if stack.confidence is not None:
            confidence_B = stack.confidence(k, state_BC).sigmoid()
        if logits_BV is None:
            logits_BV = self._draft_head(state_B1C)[:, 0]
        if stack.rescorer is not None:
            logits_BV = stack.rescore(k, state_BC, logits_BV, self._before(k)[:, 0])
        return DepthDraft(logits_BV, confidence_B)

    def _before(self, k: int) -> Tensor:
        """The tokens [B, 1] before the drafts of depth ``k``."""
        return Spans(self._tables, self.n_read, 1).read(self.tokens_BS, k - 1)

    def _newest_states(self, k: int) -> tuple[Tensor, Tensor | None]:
        """Bring depth ``k`` up to date. Returns the states [B, 1, C] that the drafts come from, and
        the draft head's logits [B, V] if a pass has computed them."""
        if self._block is not None and k > 1:
            return self._block.depth(k)
        if self._one_cache and k > 1:
            return self._next_in_one_cache(k), None
        self._append_positions(k)
        self.catch_up(k)
        # The newest position is always computed, for its logits. (A row that has slid to its
        # pending token alone has no such position; its draft is arbitrary.)
        ends = [max(n, 1) for n in self.n_read]
        starts = [min(n, end - 1) for n, end in zip(self.filled[k], ends, strict=True)]
        width = max(end - start for end, start in zip(ends, starts, strict=True))
        # Rows with few new positions start earlier, so that none writes beyond the buffer.
        last = self._tables.capacity - self._widest - width
        starts = [min(start, last) for start in starts]
        index = [end - start - 1 for end, start in zip(ends, starts, strict=True)]
        cache, fused_draft = self.depth_caches[k - 1], self._fused_drafts[k - 1]
        if fused_draft is not None:
            cache.open(starts, width)
            after = self.states[k] if k < len(self.states) else None
            return fused_draft(cache, self.tokens_BS, self.states[k - 1], after, index)
        hidden = self._run_depth(k, width, cache, slice(None), starts)
        if self._block is not None:
            self._block.read(cache, self._before(k), self.n_read)
            return self._block.depth(k)
        if all(place == index[0] for place in index):
            return hidden[:, index[0]].unsqueeze(1), None
        return at(hidden, index), None

    def _next_in_one_cache(self, k: int) -> Tensor:
        """The states [B, 1, C] after those of the draft before, in the first depth's cache."""
        newest = self.newest_B1C
        assert newest is not None
        cache = self.depth_caches[0]
        ctx = ForwardContext.of_cache(cache, [max(n, 1) + k - 2 for n in self.n_read], 1)
        tokens = cache.spans.read(self.tokens_BS, 1)
        return self.model.depth_state(1, newest, newest, tokens, ctx)

    def _append_positions(self, k: int) -> None:
        """Before the first draft of a round, read the branch state of a stack that appends
        positions to the text. The next verify pass overwrites their entries."""
        if self._keeps_branch or k > 1:
            return
        ctx = ForwardContext.of_cache(self.trunk_cache, self.n_read, self.max_draft)
        branch = self._stack.append(self.model.trunk, ctx)
        newest = [max(n - 1, 0) for n in self.n_read]
        Spans(self._tables, newest, 1).write(self.states[0], branch)
        # Drafts are made at the newest position alone.
        for filled, cache in zip(self.filled[1:], self.depth_caches, strict=True):
            filled[:], cache.lengths = newest, list(newest)

    def catch_up(self, k: int) -> None:
        """Let depth ``k`` read the known tokens of rows that are new or have not drafted recently.

        The shallower depths must have caught up. The few positions that an ordinary round leaves
        open are read by the next :meth:`draft`.
        """
        filled, cache = self.filled[k], self.depth_caches[k - 1]
        # The most open positions of a row that drafted last round.
        allowance = k + self.most_accepted + 1
        if max(map(sub, self.n_read, filled)) <= allowance:
            return
        late = [n - n_filled > allowance for n, n_filled in zip(self.n_read, filled, strict=True)]
        if not self._stack.cached_blocks:
            # No position reads another: skip to the first that a draft of this round depends on.
            for row in compress(range(len(late)), late):
                filled[row] = cache.lengths[row] = self.n_read[row] - self.max_draft
            return
        ends = [n - k for n in self.n_read]
        for is_late, places in groupby(range(len(late)), key=late.__getitem__):
            if not is_late:
                continue
            group = list(places)
            lengths = [ends[row] - filled[row] for row in group]
            for part in passes_over(lengths, self.tokens_BS.device):
                rows = slice(group[0] + part.start, group[0] + part.stop)
                width = max(lengths[part])
                # Rows with less to read start earlier, so that none reads beyond its tokens.
                starts = [max(end - width, 0) for end in ends[rows]]
                self._run_depth(k, width, cache.rows(rows), rows, starts)
                cache.lengths[rows] = filled[rows] = ends[rows]

    def _run_depth(
        self, k: int, width: int, cache: KVCache, rows: slice, starts: list[int]
    ) -> Tensor:
        """Let depth ``k`` read ``width`` positions of some rows; stores and returns its states."""
        ctx, spans = ForwardContext.of_cache(cache, starts, width), cache.spans
        first = self._stack.reads(k).start
        token_spans = spans if first == k else Spans(self._tables, starts, width + k - first)
        tokens = token_spans.read(self.tokens_BS[rows], first)
        branch = spans.read(self.states[0][rows])
        if self._block is not None:
            self._stack.read(branch, ctx)
            return branch
        previous = branch if k == 1 else spans.read(self.states[k - 1][rows])
        hidden = self.model.depth_state(k, branch, previous, tokens, ctx)
        if k < len(self.states):
            spans.write(self.states[k][rows], hidden)
        return hidden

    def accept(self, accepted: Sequence[int]) -> None:
        for k in range(1, self._n_drafted + 1):
            ahead, rows = self._stack.ahead(k), zip(self.n_read, accepted, strict=True)
            # Entries that depend on accepted drafts are now true.
            self.filled[k] = [max(0, min(n, n + a - ahead + 1)) for n, a in rows]
        self._n_drafted = 0
        super().accept(accepted)

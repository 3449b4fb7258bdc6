"""A session whose rounds draft a tree (SpecInfer, arXiv 2305.09781; Medusa, arXiv 2401.10774).

Node 0 of the tree is the pending token, at position n of its row; a node of depth e has position
n + e. The token buffer stores the nodes in order at n, n + 1, .., and so do caches and states.

Depth k's entry at position i depends on the tokens up to i + k. The entries that depend on drafts
form a tree too, with the nodes down to depth k - 1. Its node 0 is at position n - k: the newest
entry that depends on known tokens alone. So a pass of depth k reads first the positions that it has
to catch up with, then this tree. The candidates of the next depth follow the deepest nodes.

Shapes: B rows, T tokens of a pass, P nodes of a depth, C d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.decoding.session import Session
from mtp_lightning.decoding.tree import Tree, ancestor
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.position_tables import Spans
from mtp_lightning.nn.tree_cache import Branches, TreeCache, along


class TreeSession(Session):
    """A :class:`Session` that drafts the same tree in every round."""

    trunk_cache: TreeCache
    depth_caches: Sequence[TreeCache]
    _outputs: Tensor
    _kind_of_cache = TreeCache

    def __init__(self, model: MTPModel, *, tree: Tree, **common: Any) -> None:
        self.tree = tree
        self._branches = lru_cache(maxsize=64)(self._branches_of)
        self._columns = lru_cache(maxsize=256)(self._columns_of)
        super().__init__(model, max_draft=tree.depth, **common)

    @property
    def _widest(self) -> int:
        return len(self.tree) + self.tree.depth + 1

    def is_short(self, row: int) -> bool:
        """Whether a row has read too few tokens to draft; it then decodes plainly for a few tokens.

        The newest known entry of a depth, or the entries to catch up with, would have negative
        positions.
        """
        return self.n_read[row] <= 2 * self.tree.depth

    def draft_tree(self, k: int) -> Tensor:
        """Bring depth ``k`` up to date, and return the logits [B, P, V] of the candidates that
        follow each node of depth ``k - 1``. The nodes down to these must be in the token buffer."""
        nodes = self.tree.level(k - 1)
        # A depth that reads no drafts has the same state after all nodes.
        if self._block is not None or not self._stack.reads(k):
            return self._draft_from_one_state(k, nodes).expand(-1, len(nodes), -1)
        if self._one_cache and k > 1:
            return self._draft_tree_on(k)
        self._append_positions(k)
        self.catch_up(k)
        long = [row for row in range(len(self.n_read)) if not self.is_short(row)]
        ends = [n - k + 1 for n in self.n_read]
        caught_up = max([1, *(ends[row] - self.filled[k][row] for row in long)])
        # A short row reads from position 0, and its drafts are not verified.
        starts = [
            0 if self.is_short(row) else max(end - caught_up, 0) for row, end in enumerate(ends)
        ]
        cache = self.depth_caches[k - 1]
        ctx = ForwardContext.of_tree(cache, starts, self._branches(k - 1, caught_up))
        n_B1 = torch.tensor(self.n_read, device=self.tokens_BS.device).unsqueeze(1)

        def take(buffer: Tensor, ahead: int | None) -> Tensor:
            return along(buffer, (n_B1 + self._columns(k, caught_up, ahead)).clamp_(min=0))

        first = self._stack.reads(k).start
        tokens = torch.cat([take(self.tokens_BS, j) for j in range(first, k + 1)], dim=1)
        branch = take(self.states[0], 0)
        previous = branch if k == 1 else take(self.states[k - 1], None)
        width = caught_up + nodes.stop - 1
        hidden = self.model.depth_state(k, branch, previous, tokens, ctx, tokens_apart=width)
        if k < len(self.states):
            cache.spans.write(self.states[k], hidden)
        if self._one_cache:
            self._outputs = hidden[:, -1:]  # of node 0
        return self._drafted(k, hidden)

    def _draft_from_one_state(self, k: int, nodes: range) -> Tensor:
        """:meth:`draft_tree` of a stack that computes one state for all nodes."""
        state = self._newest_states(k)[0]
        before_BP = Spans(self._tables, self.n_read, len(nodes)).read(self.tokens_BS, nodes.start)
        if self._block is not None:
            state = self._stack.corrected(k, state, before_BP)
        state = self._stack.head_input(state)
        return self._stack.rescore(k, state, self._draft_head(state), before_BP)

    def _drafted(self, k: int, hidden: Tensor) -> Tensor:
        """The logits [B, P, V] after the nodes of depth ``k - 1``, whose states are the last of
        ``hidden``."""
        newest = hidden[:, -len(self.tree.level(k - 1)) :]
        return self._draft_head(self._stack.head_input(newest))

    def _draft_tree_on(self, k: int) -> Tensor:
        """:meth:`draft_tree` from the drafts before, in the first depth's cache (EAGLE-2, arXiv
        2406.16858, without its choice of a tree by confidence).

        The entry of a node of depth e is e positions after node 0's: its hidden state is the
        module's output at the node's parent, its token the node's own. A pass covers all nodes down
        to depth ``k - 1``, of which the last level is new: a cache keeps no tree between passes.
        """
        nodes = range(1, self.tree.level(k - 1).stop)
        parents = self.tree.parents(k - 1)[1:]
        # Node 0 is read already, so the nodes of depth 1 have no parent in this pass.
        branches = Branches([parent - 1 for parent in parents], self.tokens_BS.device)
        cache = self.depth_caches[0]
        starts = [min(n, length) for n, length in zip(self.n_read, cache.lengths, strict=True)]
        ctx = ForwardContext.of_tree(cache, starts, branches)
        before = self._outputs[:, parents]
        tokens = Spans(self._tables, self.n_read, len(nodes)).read(self.tokens_BS, 1)
        hidden = self.model.depth_state(1, before, before, tokens, ctx)
        self._outputs = torch.cat((self._outputs[:, :1], hidden), 1)  # of all nodes so far
        return self._drafted(k, hidden)

    def verify_tree(self) -> Tensor:
        """Read every row's pending token and its tree. Returns logits [B, 1 + nodes, V]."""
        cache, branches = self.trunk_cache, self._branches(self.tree.depth, 1)
        return self._logits(self._run_trunk(ForwardContext.of_tree(cache, self.n_read, branches)))

    def accept_path(self, path_BE: Tensor, accepted: Sequence[int]) -> None:
        """Keep the pending token and a path of the tree in every row. ``path_BE`` holds the path's
        nodes, node 0 first; entries after a row's ``accepted`` drafts are ignored."""
        self.trunk_cache.keep_path(path_BE)
        if self._keeps_branch:
            tree_states = self.trunk_cache.spans.read(self.states[0])
            spans = Spans(self._tables, self.n_read, path_BE.shape[1])
            spans.write(self.states[0], along(tree_states, path_BE))
        for k in range(1, self.tree.depth + 1):
            ahead = self._stack.ahead(k)
            # Entries of accepted nodes are not stored at their own positions: recompute them.
            self.filled[k] = [
                0 if ahead and self.is_short(row) else max(0, min(n, n - ahead + 1))
                for row, n in enumerate(self.n_read)
            ]
        super().accept(accepted)
        self.trunk_cache.lengths = list(self.n_read)

    def _branches_of(self, depth: int, caught_up: int) -> Branches:
        """``caught_up`` positions in a chain, the last one being node 0, then the tree below it."""
        parents = [i - 1 for i in range(caught_up)]
        parents += [caught_up - 1 + parent for parent in self.tree.parents(depth)[1:]]
        return Branches(parents, self.tokens_BS.device)

    def _columns_of(self, k: int, caught_up: int, ahead: int | None) -> Tensor:
        """Columns [T], relative to position n, that the tokens of depth ``k``'s pass read: those of
        the tokens that many positions ``ahead`` (0 for the branch states), or for None those of the
        states of depth ``k - 1``, which are stored from position n - (k - 1) on."""
        up, before = (1, k - 1) if ahead is None else (k - ahead, 0)
        parents, nodes = self.tree.parents(k - 1), range(1 - caught_up, self.tree.level(k - 1).stop)
        columns = [ancestor(parents, node, up) - before for node in nodes]
        return torch.tensor(columns, device=self.tokens_BS.device)

"""A session whose rounds draft a tree (SpecInfer, arXiv 2305.09781; Medusa, arXiv 2401.10774).

Node 0 of the tree is the pending token, at position n of its row; one of depth e stands at n + e.
Nodes lie in the token buffer at n, n + 1, .. in their order, and so do their entries and states.

Depth k's entry at position i rests on tokens up to i + k. What of it rests on drafts is a tree as
well, of nodes down to depth k - 1, whose node 0 stands at position n - k: the newest entry that
rests on known tokens alone. So every depth's pass reads the positions that it has to catch up with
and, behind them, the tree down to there; the next depth's candidates follow the deepest nodes.

Shapes: B rows, T tokens of a pass, P nodes of a depth, C d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mtp_lightning.decoding.session import Session
from mtp_lightning.decoding.tree import Tree, ancestor, depth_of
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import BranchPoint
from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.batch_invariant import batch_invariant_pass
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.position_tables import PositionTables, Runs
from mtp_lightning.nn.tree_cache import Branches, TreeCache, along


class TreeSession(Session):
    """A :class:`Session` for one tree.

    Args:
        model: see there.
        places: see there.
        capacity: see there.
        tree: of every round.
        draft_vocab: see there.
    """

    def __init__(
        self,
        model: MTPModel,
        *,
        places: int,
        capacity: int,
        tree: Tree,
        draft_vocab: int | None = None,
    ) -> None:
        self.tree = tree
        self._branches = lru_cache(maxsize=64)(self._branches_of)
        self._columns = lru_cache(maxsize=256)(self._columns_of)
        super().__init__(
            model,
            places=places,
            capacity=capacity,
            max_draft=tree.depth,
            draft_vocab=draft_vocab,
        )

    def _cache(self, tables: PositionTables, n_layers: int, places: int) -> KVCache:
        return TreeCache(self.model.config.trunk, tables, n_layers=n_layers, batch_size=places)

    @property
    def _widest(self) -> int:
        return len(self.tree) + self.tree.depth + 1

    def is_short(self, row: int) -> bool:
        """Whether a row has read too little to draft: a depth's newest known entry, and what it has
        to catch up with, may lie before the text. It then decodes plainly for a few tokens."""
        return self.n[row] <= 2 * self.tree.depth

    def draft_tree(self, k: int) -> Tensor:
        """Bring depth ``k`` up to date. Returns the logits [B, P, V] of the candidates that follow
        every node of depth ``k - 1``; the nodes down to there must be in the buffer."""
        nodes = self.tree.level(k - 1)
        if not self.model.mtp.ahead([k]):  # it reads no drafts: all nodes are followed by the same
            return self.draft(k).unsqueeze(1).expand(-1, len(nodes), -1)
        self.catch_up(k)
        long = [row for row in range(self.batch_size) if not self.is_short(row)]
        known = [n - k + 1 for n in self.n]
        caught_up = max((known[row] - self.filled[k][row] for row in long), default=1)
        caught_up = max(caught_up, 1)
        # A short row has read nothing, and its drafts are not judged.
        starts = [
            0 if self.is_short(row) else max(end - caught_up, 0) for row, end in enumerate(known)
        ]
        cache = self.depth_caches[k - 1]
        assert isinstance(cache, TreeCache)
        positions = Positions.of_tree(cache, starts, self._branches(k - 1, caught_up))
        n_B1 = torch.tensor(self.n, device=self.tokens_BS.device).unsqueeze(1)

        def read(buffer: Tensor, what: str, j: int = 0) -> Tensor:
            column_BT = (n_B1 + self._columns(what, k, caught_up, j)).clamp_(min=0)
            return along(buffer, column_BT)

        first = self.model.mtp.first_token(k)
        tokens = torch.cat([read(self.tokens_BS, "tokens", j) for j in range(first, k + 1)], dim=1)
        at = BranchPoint(
            hidden=read(self.states[0], "positions"),
            tokens=tokens,
            embedded=self.model.trunk.embedding(tokens),
            positions=positions,
            first=first,
            stride=caught_up + nodes.stop - 1,
            head=self.model.head,
        )
        previous = at.hidden if k == 1 else read(self.states[k - 1], "before")
        hidden = self.model.mtp.depth_state(k, at, previous)
        if k < len(self.states):
            cache.runs.write(self.states[k], hidden)
        newest = slice(caught_up - 1 + nodes.start, caught_up - 1 + nodes.stop)
        return self._draft_head(hidden[:, newest])

    def put_nodes(self, tokens_BP: Tensor, k: int) -> None:
        """Write the candidates of depth ``k``."""
        self.put(tokens_BP, self.tree.level(k).start)

    def verify_tree(self) -> Tensor:
        """Read every row's pending token and its tree. Returns logits [B, 1 + nodes, V]."""
        cache, model = self.trunk_cache, self.model
        assert isinstance(cache, TreeCache)
        branches = self._branches(self.tree.depth, 1)
        with batch_invariant_pass(branches.width, self.tokens_BS.device):
            positions = Positions.of_tree(cache, self.n, branches)
            tokens = cache.runs.read(self.tokens_BS)
            output = model.trunk(model.trunk.embedding(tokens), positions)
            main = model.mtp.main_state(output.final)
        self._branch_BTC = model.mtp.branch(model.trunk, output)
        return model.head(main)

    def accept_path(self, path_BE: Tensor, accepted: Sequence[int]) -> None:
        """Keep the pending token and a path of the tree in every row.

        Args:
            path_BE: nodes, from node 0 on; those behind the accepted ones may be any.
            accepted: how many of them were drafts.
        """
        assert isinstance(self.trunk_cache, TreeCache)
        self.trunk_cache.settle(path_BE)
        runs = Runs(self._tables, self.n, path_BE.shape[1])
        runs.write(self.states[0], along(self._branch_BTC, path_BE))
        for k in range(1, self.tree.depth + 1):
            ahead = self.model.mtp.ahead([k])
            # Entries of accepted nodes do not lie in their positions: they are made again.
            self.filled[k] = [
                0 if ahead and self.is_short(row) else max(0, min(n, n - ahead + 1))
                for row, n in enumerate(self.n)
            ]
        self.n = [n + a + 1 for n, a in zip(self.n, accepted, strict=True)]
        self.trunk_cache.lengths = list(self.n)

    def _branches_of(self, depth: int, caught_up: int) -> Branches:
        """Positions one after the other, the last of them node 0, and the tree down to a depth."""
        parents = [i - 1 for i in range(caught_up)]
        parents += [caught_up - 1 + parent for parent in self.tree.parents_to(depth)[1:]]
        return Branches(parents, self.tokens_BS.device)

    def _columns_of(self, what: str, k: int, caught_up: int, j: int) -> Tensor:
        """Where, from position n on, the tokens of depth ``k``'s pass find what they read, [T]:
        their ``positions``, the state of the depth ``before``, the ``tokens`` j places on."""
        parents = self.tree.parents_to(k - 1)

        def of_node(node: int) -> int:
            depth = depth_of(parents, node)
            if what == "positions":
                return depth - k
            if what == "before":
                return parents[node] - (k - 1)
            token = ancestor(parents, node, k - j)
            return depth - k + j if token is None else token

        places: Callable[[int], int] = (lambda i: i + j) if what == "tokens" else (lambda i: i)
        known = [places(i - k) for i in range(1 - caught_up, 1)]
        columns = [*known, *(of_node(node) for node in range(1, len(parents)))]
        return torch.tensor(columns, device=self.tokens_BS.device)

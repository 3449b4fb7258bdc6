"""The shape of a tree of drafts: how many candidates each depth has after every node above it.

Node 0 is the pending token; the nodes of depth e are the candidates for the token e positions after
it. Nodes are numbered depth by depth; the children of a node are adjacent, the likeliest first.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from mtp_lightning.errors import UserError
from mtp_lightning.nn.batch_invariant import MAX_VERIFY_WIDTH
from mtp_lightning.settings import is_whole


@dataclass(frozen=True)
class Tree:
    """A tree of drafts; every node at depth 0, 1, .. has ``widths`` children.

    Raises:
        UserError: a width is not a whole number of at least 1, or the tree is too large for a
            verify pass.
    """

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        widths = list(self.widths) if isinstance(self.widths, Sequence) else []
        if not widths or not all(is_whole(width) and width >= 1 for width in widths):
            raise UserError(
                f"tree={widths or self.widths} must be a list of whole numbers of at least 1, as "
                "[3,2]."
            )
        object.__setattr__(self, "widths", tuple(widths))
        if len(self) >= MAX_VERIFY_WIDTH:
            raise UserError(
                f"tree={widths} drafts {len(self)} tokens a round: use one of at most "
                f"{MAX_VERIFY_WIDTH - 1}, as a pass of more than {MAX_VERIFY_WIDTH} tokens would "
                "not give plain decoding's text."
            )

    def __len__(self) -> int:
        """Number of candidates in all depths."""
        return sum(itertools.accumulate(self.widths, operator.mul))

    @property
    def depth(self) -> int:
        """Tokens of a path."""
        return len(self.widths)

    def level(self, depth: int) -> range:
        """The nodes of a depth."""
        first, size = 0, 1
        for width in self.widths[:depth]:
            first, size = first + size, size * width
        return range(first, first + size)

    def children(self, node: int, depth: int) -> range:
        """The nodes that follow one of ``depth``."""
        width, below = self.widths[depth], self.level(depth + 1)
        first = below.start + (node - self.level(depth).start) * width
        return range(first, first + width)

    def parents(self, depth: int | None = None) -> list[int]:
        """The parent of every node down to ``depth``, by default of all nodes; -1 for node 0."""
        parents = [-1]
        for e in range(self.depth if depth is None else depth):
            parents += [node for node in self.level(e) for _ in range(self.widths[e])]
        return parents


def ancestor(parents: Sequence[int], node: int, up: int) -> int:
    """The node ``up`` levels above ``node``; -1, -2, .. are the tokens before node 0."""
    for _ in range(up):
        node = parents[node] if node > 0 else node - 1
    return node

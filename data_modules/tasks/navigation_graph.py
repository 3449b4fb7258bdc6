"""The graph of ``data=navigation``, and how walks on it are written: the ids of the start and of
the goal, the equals sign, and each step as the difference of two nodes.

Shapes: N nodes, W tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_modules.tasks.base import Draws

FIRST = 2
"""Id of the first node; those of the steps come after the nodes."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A directed graph; ``edges`` (``[N, N]`` bool) says whether a step leads from the first node
    to the second."""

    edges: np.ndarray

    @property
    def nodes(self) -> int:
        return len(self.edges)

    @cached_property
    def distances(self) -> np.ndarray:
        """``[N, N]`` int64: steps from the first node to the second; -1 where there is no path."""
        distances = np.where(np.eye(self.nodes, dtype=bool), 0, -1)
        reached, steps = np.eye(self.nodes, dtype=bool), 0
        while reached.any():
            steps += 1
            reached = ((reached.astype(np.float32) @ self.edges) > 0) & (distances < 0)
            distances[reached] = steps
        return distances

    @cached_property
    def ways(self) -> np.ndarray:
        """``[N, N]`` float64: number of shortest paths from the first node to the second."""
        counts = np.eye(self.nodes)
        for steps in range(1, int(self.distances.max()) + 1):
            nearer = counts * (self.distances == steps - 1)
            counts = np.where(self.distances == steps, self.edges @ nearer, counts)
        return counts

    def path(self, start: int, goal: int, draws: Draws) -> list[int]:
        """A shortest path from start to goal, uniformly drawn."""
        path = [start]
        for u in draws.uniform(int(self.distances[start, goal])).tolist():
            node = path[-1]
            nearer = self.edges[node] & (self.distances[:, goal] == self.distances[node, goal] - 1)
            choices = np.flatnonzero(nearer)
            shares = self.ways[choices, goal].cumsum()
            path.append(int(choices[np.searchsorted(shares, u * shares[-1], side="right")]))
        return path

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        n = self.nodes
        steps = (f"{step:+}" for step in range(1 - n, n) if step)
        return (".", "=", *(f"n{i}" for i in range(n)), *steps)

    def step_id(self, step: int) -> int:
        """The id of a difference of nodes, which is not 0."""
        return FIRST + self.nodes + step + self.nodes - 1 - (step > 0)

    def places(self, tokens: np.ndarray) -> np.ndarray:
        """``[.., W]`` the node reached after each token of a window; other tokens move nobody.
        A walk may leave the ids of nodes, below 0 or above N - 1."""
        first = FIRST + self.nodes
        steps = tokens - first - self.nodes + 1
        steps = np.where(tokens < first, 0, steps + (steps >= 0))
        return tokens[..., :1] - FIRST + steps.cumsum(-1)

    def surprisals(self, tokens: np.ndarray) -> np.ndarray:
        """``[.., W]`` float64 nats of each token of shortest paths given those before it: the least
        expected loss on validation. 0 for other tokens."""
        place = self.places(tokens)
        before, after = place[..., :-1], place[..., 1:]
        goal = np.broadcast_to(tokens[..., 1:2] - FIRST, after.shape)
        nats = np.zeros(tokens.shape)
        nats[..., 1:] = np.log(self.ways[before, goal] / self.ways[after, goal])
        return np.where(tokens < FIRST + self.nodes, 0.0, nats)


def street(draws: Draws, n: int, density: float) -> np.ndarray:
    """``[N, N]`` bool, symmetric: a street graph of points whose ids follow their first coordinate,
    so that near nodes tend to have near ids."""
    points = draws.uniform(2 * n).reshape(n, 2)
    points = points[np.lexsort((points[:, 1], points[:, 0]))]
    lengths = ((points[:, None] - points) ** 2).sum(-1)
    tree = np.zeros((n, n), dtype=bool)
    nearest, in_tree = np.zeros(n, dtype=int), np.arange(n) == 0
    for _ in range(n - 1):  # Prim 1957
        distances = np.where(in_tree, np.inf, lengths[nearest, np.arange(n)])
        node = int(distances.argmin())
        tree[node, nearest[node]] = tree[nearest[node], node] = in_tree[node] = True
        nearest = np.where(lengths[node] < lengths[nearest, np.arange(n)], node, nearest)
    other_edges = [(i, j) for i, j in np.argwhere(np.triu(delaunay(points))) if not tree[i, j]]
    order = draws.permutation(len(other_edges))
    for i, j in (other_edges[k] for k in order[: int(len(other_edges) * density)]):
        tree[i, j] = tree[j, i] = True
    return tree


def delaunay(points: np.ndarray) -> np.ndarray:
    """``[N, N]`` bool: the pairs of points that lie on a circle without a point inside. The center
    of a circle is ``middle + t normal``, and every other point bounds t from one side."""
    n = len(points)
    is_edge = np.zeros((n, n), dtype=bool)
    for i in range(n - 1):
        ends = points[i + 1 :]
        middle, along = (points[i] + ends) / 2, ends - points[i]
        normal = np.stack((-along[:, 1], along[:, 0]), axis=1)
        offsets = points - middle[:, None]
        side = (offsets * normal[:, None]).sum(-1)
        slack = (offsets**2).sum(-1) - (along**2).sum(-1, keepdims=True) / 4
        with np.errstate(divide="ignore", invalid="ignore"):
            bound = slack / (2 * side)
        rows = np.arange(len(ends))
        other = np.ones(side.shape, dtype=bool)
        other[:, i], other[rows, i + 1 + rows] = False, False
        upper = np.where(other & (side > 0), bound, np.inf).min(1)
        lower = np.where(other & (side < 0), bound, -np.inf).max(1)
        is_edge[i, i + 1 :] = lower <= upper
    return is_edge | is_edge.T

"""Find a shortest path on a graph that no prompt shows: a world that must be learned.

Zhong et al. 2026, LSE-MTP (arXiv 2604.06155), section 5. One graph, drawn by the seed, holds all
examples. A path is written as the differences of its nodes' ids, so the model must keep track of
where it stands. Training asks for half of all reachable pairs, validation for the others.

    n3 n17 = +2 +9 +3 .        from node 3 by 5 and 14 to node 17

Training also shows detours, around a node of the shortest path, and recoveries, which begin with a
random step. The paper lists three shortest simple paths of each pair; here a path is drawn
uniformly among the shortest ones, so that the exact probability of every token is known.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from data_modules.tasks.base import END, ONCE, STREAM, Draws, Example, Task, option
from data_modules.tasks.measures import Excess, TaskMeasure, Training
from data_modules.tasks.navigation_graph import FIRST, Graph, street
from data_modules.tasks.navigation_measures import BeliefCosine, Shortcuts, Walks
from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_choice, require_number

EQUALS = 1
EXTRA = 4
"""Steps by which a detour may exceed the longest shortest path."""


@dataclass(frozen=True, kw_only=True)
class Navigation(Task):
    """Paths on one graph.

    Attributes:
        graph: ``street`` takes random points of the square, their minimum spanning tree, and of the
            other edges of their Delaunay triangulation a share; ``random`` takes each directed edge
            with a probability (Erdos-Renyi).
        nodes: N, >= 4.
        density: that share or probability, in [0, 1].
        training: share of the reachable pairs that training asks for, in (0, 1).
        detours: share of training examples that avoid a node of the shortest path.
        recoveries: share of training examples whose first step is a random one.
    """

    name = "navigation"
    ends = True
    longest_prompt = 3

    graph: str = option("street", require_choice, choices=["street", "random"])
    nodes: int = option(40, least=4)
    density: float = option(0.3, require_number, least=0, most=1)
    training: float = option(0.5, require_number, above=0, below=1)
    detours: float = option(0.1, require_number, least=0, most=1)
    recoveries: float = option(0.1, require_number, least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detours + self.recoveries > 1:
            raise UserError(
                f"data.task.detours={self.detours} and data.task.recoveries={self.recoveries} are "
                "shares of the same examples: their sum must be at most 1."
            )

    @cached_property
    def world(self) -> Graph:
        draws, n = self.draws(ONCE), self.nodes
        if self.graph == "street":
            return Graph(street(draws, n, self.density))
        return Graph((draws.uniform(n * n).reshape(n, n) < self.density) & ~np.eye(n, dtype=bool))

    @property
    def symbols(self) -> tuple[str, ...]:
        return self.world.symbols

    @cached_property
    def longest_answer(self) -> int:
        return int(self.world.distances.max()) + EXTRA + 1

    @cached_property
    def chance(self) -> float:
        """Exact match of random steps and ends: ``sum_L A^L[start, goal] / (2 N - 1)^(L + 1)``,
        mean over the pairs of validation."""
        symbols = 2 * self.nodes - 1
        right = np.linalg.inv(symbols * np.eye(self.nodes) - self.world.edges)
        return float(np.mean([right[pair] for pair in self._pairs[1]]))

    def example(self, index: int) -> Example:
        draws = self.draws(index)
        training_pairs, validation_pairs = self._pairs
        if index < STREAM:
            start, goal = validation_pairs[index % len(validation_pairs)]
            return self._written(goal, self.world.path(start, goal, draws))
        start, goal = training_pairs[draws.below(len(training_pairs))]
        kind = float(draws.uniform(1)[0])
        path = self.world.path(start, goal, draws)
        if kind < self.detours:
            path = self._detour(path, draws)
        elif kind < self.detours + self.recoveries:
            choices = np.flatnonzero(self.world.edges[start] & (self.world.distances[:, goal] >= 0))
            step = int(choices[draws.below(len(choices))])
            path = [start, *self.world.path(step, goal, draws)]
        return self._written(goal, path)

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether it is a walk along edges from start to goal, and ends there."""
        *steps, end = answer or [-1]
        if end != END or not all(FIRST + self.nodes <= s < len(self.symbols) for s in steps):
            return False
        path = self.world.places(np.array([*prompt, *steps]))[len(prompt) - 1 :]
        on_graph = bool(((path >= 0) & (path < self.nodes)).all())
        arrived = len(path) > 1 and path[-1] == prompt[1] - FIRST
        return bool(on_graph and arrived and self.world.edges[path[:-1], path[1:]].all())

    def content(self, example: Example) -> Hashable:
        """The pair, whatever the path."""
        return tuple(example.prompt)

    def measures(
        self, *, n: int, d_model: int, training: Training | None = None
    ) -> Sequence[TaskMeasure]:
        """``legality`` and ``arrival`` of greedy answers, ``shortcut_mass``, ``belief_cosine``,
        ``surprisal`` and ``excess_loss``."""
        return (
            Walks(self.world, longest_answer=self.longest_answer),
            Shortcuts(self.world),
            BeliefCosine(self.world, d_model=d_model),
            Excess(self.world.surprisals),
        )

    @cached_property
    def _pairs(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Reachable pairs of different nodes: those of training and those of validation."""
        pairs = [(int(a), int(b)) for a, b in np.argwhere(self.world.distances > 0)]
        order = self.draws(ONCE + 1).permutation(len(pairs))
        cut = round(self.training * len(pairs))
        if not 0 < cut < len(pairs):
            raise UserError(
                f"data.task.density={self.density} leaves {len(pairs)} reachable pairs of nodes, "
                f"which data.task.training={self.training} cannot divide: raise the density, or "
                "give a share nearer to 0.5."
            )
        return [pairs[i] for i in order[:cut]], [pairs[i] for i in order[cut:]]

    def _detour(self, path: list[int], draws: Draws) -> list[int]:
        """A shortest path around a random inner node of a path; the path itself if it has fewer
        than 4 nodes or there is no such path that is short enough."""
        start, goal = path[0], path[-1]
        if len(path) < 4:
            return path
        avoided = path[1 + draws.below(len(path) - 2)]
        onward = {goal: goal}  # each node that was reached, and the next one on its way to the goal
        reached = [goal]
        for node in reached:  # breadth first: the list grows meanwhile
            if start in onward:
                break
            for other in np.flatnonzero(self.world.edges[:, node]).tolist():
                if other != avoided and other not in onward:
                    onward[other] = node
                    reached.append(other)
        detour = [start]
        while detour[-1] in onward and detour[-1] != goal:
            detour.append(onward[detour[-1]])
        return detour if detour[-1] == goal and len(detour) <= self.longest_answer else path

    def _written(self, goal: int, path: list[int]) -> Example:
        steps = [self.world.step_id(b - a) for a, b in pairwise(path)]
        return Example([FIRST + path[0], FIRST + goal, EQUALS], [*steps, END])

"""Find the path through a star graph: the least planning task that next-token training fails at.

Bachmann & Nagarajan 2024, "The pitfalls of next-token prediction" (arXiv 2403.06963), section 4.1.
A node has ``degree`` arms; the arm that leads to the goal can be found from the goal, going
backwards. With teacher forcing, a model learns to follow an arm once it is given the first step,
and guesses that step: 1 / degree.

    0 5 | 7 3 | 0 7 | 5 9 / 0 3 = 0 7 3        degree 2, length 3: edges / start goal = path
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from data_modules.tasks.base import ONCE, Example, Task, option
from mtp_lightning.errors import UserError

BAR, SLASH, EQUALS, FIRST = 1, 2, 3, 4
"""Ids of the separators, and of the first name."""


@dataclass(frozen=True, kw_only=True)
class StarGraph(Task):
    """G(degree, length): prompts of 3 E + 3 tokens with E = degree (length - 1) edges, and answers
    of ``length``.

    Attributes:
        degree: d, arms that leave the start, >= 1.
        length: l, nodes of the path from start to goal, both counted, >= 2; and of every arm.
        nodes: N, names that the graph's 1 + d (l - 1) nodes are drawn from without repetition.
        reverse: whether the answer is the path from the goal to the start.
        fixed: number of graphs; each example uses one of them, with its own goal and order of
            edges. None for a new graph every time.
    """

    name = "star_graph"

    degree: int = option(2, least=1)
    length: int = option(4, least=2)
    nodes: int = option(12, least=1)
    reverse: bool = False
    fixed: int | None = option(None, least=1, null="no end")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edges >= self.nodes:
            raise UserError(
                f"data.task.nodes={self.nodes} names are too few for a star graph of "
                f"data.task.degree={self.degree} and data.task.length={self.length}, which has "
                f"{self.edges + 1} nodes: raise data.task.nodes to that, or take a smaller graph."
            )

    @property
    def edges(self) -> int:
        """E, the number of edges of a graph, one less than its nodes."""
        return self.degree * (self.length - 1)

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        return (".", "|", "/", "=", *map(str, range(self.nodes)))

    @property
    def longest_prompt(self) -> int:
        return 3 * self.edges + 3

    @property
    def longest_answer(self) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / self.degree

    def example(self, index: int) -> Example:
        draws = self.draws(index)
        graph, arm = draws, 0  # the names are random, so that all arms are alike
        if self.fixed is not None:
            graph = self.draws(ONCE + draws.below(self.fixed))
            arm = draws.below(self.degree)
        start, *others = (FIRST + i for i in graph.permutation(self.nodes)[: self.edges + 1])
        steps = self.length - 1
        arms = [[start, *others[a : a + steps]] for a in range(0, self.edges, steps)]
        edges = [edge for arm in arms for edge in pairwise(arm)]
        prompt: list[int] = []
        for i in draws.permutation(self.edges):
            prompt += [*edges[i], BAR]
        path = arms[arm]
        prompt[-1] = SLASH
        prompt += [start, path[-1], EQUALS]
        return Example(prompt, path[::-1] if self.reverse else path)

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether it is a walk along the prompt's edges from its start to its goal."""
        *graph, start, goal, _ = prompt
        edges = set(zip(graph[0::3], graph[1::3], strict=True))
        path = list(reversed(answer)) if self.reverse else list(answer)
        connects = len(path) > 1 and (path[0], path[-1]) == (start, goal)
        return connects and all(step in edges for step in pairwise(path))

    def content(self, example: Example) -> Hashable:
        """The graph, whatever the order of its edges, with start and goal."""
        *graph, start, goal, _ = example.prompt
        return frozenset(zip(graph[0::3], graph[1::3], strict=True)), start, goal

    def variants(self) -> dict[str, Task]:
        """One more node per arm, and one more arm, if there are enough names."""
        if self.fixed is not None:
            return {"new": replace(self, fixed=None)}
        larger = {"longer": (self.degree, self.length + 1), "wider": (self.degree + 1, self.length)}
        return {
            name: replace(self, degree=degree, length=length)
            for name, (degree, length) in larger.items()
            if 1 + degree * (length - 1) <= self.nodes
        }

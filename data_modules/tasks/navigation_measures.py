"""Measures of a model's knowledge of the graph of ``data=navigation``, from its walks, its
probabilities of shortcuts, and its states.

A model's answer may be longer than a shortest path, so windows are scored beyond the path's end,
too. Measures on the true paths leave those positions out.

Shapes: B rows, W tokens of a window, P positions, K scored positions of a batch, L those of them on
the true paths, N nodes, C d_model, V vocabulary.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data_modules.tasks.base import END
from data_modules.tasks.measures import Means, Outputs, TaskMeasure
from data_modules.tasks.navigation_graph import FIRST, Graph

PROMPT = 3
"""Tokens of a prompt: the start, the goal, and the equals sign."""
NEAR = range(2, 5)
"""Steps from the goal at which a node can be the end or the beginning of a shortcut."""


class Walks(Means):
    """Greedy answers: ``legality`` is the share of steps that follow an edge from the walk's node,
    and ``arrival`` the share of answers that end at the goal, legal or not. Both are 1 for a model
    that knows the graph. ``.._chance`` is the value of random symbols, each a step or the end: at a
    distance d of the ids, ``sum_L P(the sum of L steps is d) / (2 N - 1)``."""

    def __init__(self, graph: Graph, *, longest_answer: int) -> None:
        super().__init__("legality", "legality_chance", "arrival", "arrival_chance")
        self.graph = graph
        self.longest_answer = longest_answer

    @cached_property
    def _arrival_chance(self) -> np.ndarray:
        """By the goal's id minus the start's, shifted by N - 1: [2 N - 1]."""
        n = self.graph.nodes
        step = np.ones(2 * n - 1)
        step[n - 1] = 0  # no step leads to where it begins
        step /= len(step)
        distribution, chances = np.ones(1), np.zeros(2 * n - 1)
        for _ in range(self.longest_answer):
            middle = len(distribution) // 2
            near = np.pad(distribution, n)[middle + 1 : middle + 2 * n]
            chances += near / len(step)
            distribution = np.convolve(distribution, step)
        return chances

    def count(self, outputs: Outputs) -> list[tuple[float, int]]:
        graph = self.graph
        tokens = outputs.greedy_BW[:, : PROMPT + self.longest_answer].cpu().numpy()
        legal = guessed = 0.0
        arrived = steps = 0
        for row in tokens:
            answer = row[PROMPT:].tolist()
            length = answer.index(END) if END in answer else len(answer)
            path = graph.places(row[: PROMPT + length])[PROMPT - 1 :]
            arrived += length < len(answer) and int(path[-1]) == int(row[1]) - FIRST
            inside = (path >= 0) & (path < graph.nodes)
            pairs = zip(path[:-1], path[1:], inside[:-1] & inside[1:], strict=True)
            legal += sum(bool(ok and graph.edges[a, b]) for a, b, ok in pairs)
            guessed += float(graph.edges[path[:-1][inside[:-1]]].sum()) / (2 * graph.nodes - 2)
            steps += length
        differences = tokens[:, 1] - tokens[:, 0] + graph.nodes - 1
        by_chance = float(self._arrival_chance[differences].sum())
        n = len(tokens)
        return [(legal, steps), (guessed, steps), (float(arrived), n), (by_chance, n)]


class Shortcuts(Means):
    """``shortcut_mass``: the probability of illegal shortcuts. At a node that is 2 to 4 steps from
    the path's goal, these are the steps without an edge to other nodes that are 2 to 4 steps from
    the goal. A model that knows the graph has 0. The paper averages over single shortcuts from the
    start; here their probabilities are summed, at every node of the true path. ``legal_mass`` is
    the probability of all edges there, and ``.._chance`` that of random symbols."""

    def __init__(self, graph: Graph) -> None:
        super().__init__("shortcut_mass", "shortcut_mass_chance", "legal_mass", "legal_mass_chance")
        self.graph = graph
        nodes = range(graph.nodes)
        # From each node, the id of the step to each other; to itself, the pad symbol.
        ids = [[graph.step_id(b - a) if a != b else END for b in nodes] for a in nodes]
        self.ids_NN = np.array(ids)

    def count(self, outputs: Outputs) -> list[tuple[float, int]]:
        graph, batch = self.graph, outputs.batch
        at_L, place, goal = standing(graph, outputs)
        near = np.isin(graph.distances.T[goal], NEAR)  # [L, N]
        is_near = near[np.arange(len(place)), place]
        at_L, place, near = at_L[is_near], place[is_near], near[is_near]
        legal = graph.edges[place]
        illegal = near & ~legal & (np.arange(graph.nodes) != place[:, None])
        indices = torch.from_numpy(at_L).to(batch.device)
        ids = torch.from_numpy(self.ids_NN[place]).to(batch.device)
        probs = outputs.log_probs_KV[indices].double().exp().gather(1, ids).cpu().numpy()
        n, symbols = len(place), len(graph.symbols)
        return [
            (float(value), n)
            for which in (illegal, legal)
            for value in ((probs * which).sum(), which.sum() / symbols)
        ]


class BeliefCosine(TaskMeasure):
    """``belief_cosine``: the mean cosine of the trunk's states that stand at the same node with the
    same goal and came from different starts, and ``belief_cosine_others`` of all other pairs. A
    model whose state holds where it stands and where it goes, and nothing else, has 1; the others
    are what chance gives. Only sums of normalized states are kept. (Starts differ as long as
    ``data.eval_examples`` is at most the number of pairs of validation.)"""

    sums: Tensor
    counts: Tensor

    def __init__(self, graph: Graph, *, d_model: int) -> None:
        super().__init__()
        self.graph = graph
        self.add_sum("sums", graph.nodes**2, d_model)
        self.add_sum("counts", graph.nodes**2)

    def update(self, numbers: np.ndarray, outputs: Outputs) -> None:
        at_L, place, goal = standing(self.graph, outputs)
        belief = torch.from_numpy(place * self.graph.nodes + goal).to(self.sums.device)
        states_KC = outputs.states_BPC[outputs.batch.valid(0)]
        indices = torch.from_numpy(at_L).to(states_KC.device)
        states = states_KC[indices].double().to(self.sums.device)
        unit = states / states.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        self.sums.index_add_(0, belief, unit)
        self.counts.index_add_(0, belief, torch.ones_like(belief, dtype=torch.float64))

    def compute(self) -> dict[str, float]:
        within = float((self.sums.square().sum(-1) - self.counts).sum())
        pairs = float((self.counts * (self.counts - 1)).sum())
        n = float(self.counts.sum())
        total = float(self.sums.sum(0).square().sum()) - n
        others = n * (n - 1) - pairs
        sums = {"belief_cosine": (within, pairs), "belief_cosine_others": (total - within, others)}
        return {name: value / count for name, (value, count) in sums.items() if count >= 1}


def standing(graph: Graph, outputs: Outputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scored positions that lie on the true paths: their indices among the K, and the node and
    the goal at each, all three [L]."""
    batch = outputs.batch
    valid_BP = batch.valid(0)
    assert valid_BP is not None
    tokens, valid = batch.tokens.cpu().numpy(), valid_BP.cpu().numpy()
    place = graph.places(tokens)[:, : batch.seq_len]
    goal = np.broadcast_to(tokens[:, 1:2] - FIRST, place.shape)
    (at_L,) = np.nonzero((tokens[:, : batch.seq_len] != END)[valid])
    return at_L, place[valid][at_L], goal[valid][at_L]

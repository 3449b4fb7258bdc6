"""The navigation task: its graph, paths and measures, recomputed from the text of examples."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_modules.tasks.answers import AnswerSet
from data_modules.tasks.base import END, STREAM
from data_modules.tasks.navigation import Navigation
from data_modules.tasks.navigation_graph import FIRST, delaunay

TASKS = [Navigation(), Navigation(graph="random", nodes=25, density=0.08)]


def read(task: Navigation, prompt: list[int], answer: list[int]) -> tuple[int, int, list[int]]:
    """Start, goal and path, from the text."""
    words, steps = task.show(prompt).split(), task.show(answer).split()
    assert words[2] == "=" and steps[-1] == "."
    start, goal = (int(name.removeprefix("n")) for name in words[:2])
    return start, goal, list(itertools.accumulate(map(int, steps[:-1]), initial=start))


def neighbors(task: Navigation) -> dict[int, list[int]]:
    return {a: np.flatnonzero(row).tolist() for a, row in enumerate(task.world.edges)}


def hops(task: Navigation, start: int) -> dict[int, int]:
    """Steps to every reachable node, by breadth-first search."""
    out, distances, reached = neighbors(task), {start: 0}, [start]
    for a in reached:  # the list grows meanwhile
        for b in out[a]:
            if b not in distances:
                distances[b] = distances[a] + 1
                reached.append(b)
    return distances


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_validation_asks_for_shortest_paths_between_untrained_pairs(task: Navigation) -> None:
    table, out = {a: hops(task, a) for a in range(task.nodes)}, neighbors(task)
    reachable = {(a, b) for a in table for b in table[a] if a != b}
    n_held = len(reachable) - round(len(reachable) / 2)
    held_out, trained, n_longer = set(), set(), 0
    for i in range(n_held):
        example = task.example(i)
        start, goal, path = read(task, example.prompt, example.answer)
        held_out.add((start, goal))
        assert path[-1] == goal and len(path) - 1 == table[start][goal]
        assert all(b in out[a] for a, b in itertools.pairwise(path))
    for i in range(4000):
        example = task.example(STREAM + i)
        start, goal, path = read(task, example.prompt, example.answer)
        trained.add((start, goal))
        assert all(b in out[a] for a, b in itertools.pairwise(path)) and path[-1] == goal
        n_longer += len(path) - 1 > table[start][goal]
    assert len(held_out) == n_held and not trained & held_out and trained | held_out <= reachable
    assert len(trained) > 0.9 * (len(reachable) - n_held)
    assert 0.03 < n_longer / 4000 < 0.2  # detours and recoveries that are longer


def test_detours_avoid_a_node_and_recoveries_begin_anywhere() -> None:
    detours, recoveries = Navigation(detours=1, recoveries=0), Navigation(detours=0, recoveries=1)
    longer = wrong = 0
    for i in range(300):
        for task in (detours, recoveries):
            example = task.example(STREAM + i)
            start, goal, path = read(task, example.prompt, example.answer)
            if task is detours:
                assert len(set(path)) == len(path)
                longer += len(path) - 1 > task.world.distances[start, goal]
            else:
                assert len(path) - 2 == task.world.distances[path[1], goal]
                wrong += task.world.distances[path[1], goal] >= task.world.distances[start, goal]
    assert longer > 60 and wrong > 60


def test_paths_are_uniform_and_surprisals_their_log_probabilities() -> None:
    task = Navigation(nodes=12, density=0.8)
    a, b = max(task._pairs[1], key=lambda pair: float(task.world.ways[pair]))
    n = int(task.world.ways[a, b])
    assert n >= 3
    counts = Counter(tuple(task.world.path(a, b, task.draws(i))) for i in range(3000))
    assert len(counts) == n
    assert all(abs(c - 3000 / n) < 5 * (3000 / n) ** 0.5 for c in counts.values())
    example = task._written(b, list(next(iter(counts))))
    nats = task.world.surprisals(np.array([*example.prompt, *example.answer]))
    assert nats.sum() == pytest.approx(np.log(n)) and nats[-1] == 0


def test_a_street_graph_is_a_tree_and_edges_of_the_triangulation() -> None:
    for seed in range(5):
        tree, task = Navigation(seed=seed, density=0), Navigation(seed=seed)
        assert tree.world.edges.sum() == 2 * 39 and (tree.world.distances >= 0).all()
        edges = task.world.edges
        assert (edges == edges.T).all() and edges[tree.world.edges].all()
        assert 2 * 55 < edges.sum() < 2 * 65


def test_delaunay_edges_are_of_triangles_with_an_empty_circle() -> None:
    points = np.random.default_rng(0).uniform(size=(14, 2))
    expected = np.zeros((14, 14), dtype=bool)
    for corners in itertools.combinations(range(14), 3):
        a, b, c = points[list(corners)]
        center = np.linalg.solve(2 * np.array([b - a, c - a]), [b @ b - a @ a, c @ c - a @ a])
        radius = np.linalg.norm(a - center)
        others = [i for i in range(14) if i not in corners]
        if (np.linalg.norm(points[others] - center, axis=1) > radius).all():
            for i, j in itertools.permutations(corners, 2):
                expected[i, j] = True
    assert (delaunay(points) == expected).all()


def test_a_random_graph_has_each_edge_with_its_probability() -> None:
    n, p = 60 * 59, 0.1
    for seed in range(5):
        edges = Navigation(graph="random", nodes=60, density=p, seed=seed).world.edges.sum()
        assert abs(edges - n * p) < 4 * (n * p * (1 - p)) ** 0.5


def test_chances_of_walks_are_the_shares_of_all_answers() -> None:
    task = Navigation(nodes=4, density=1.0)
    vars(task)["longest_answer"] = 4
    walks = task.measures(n=1, d_model=4)[0]
    symbols = [END, *range(FIRST + 4, len(task.symbols))]
    for start, goal in ((0, 1), (3, 0)):
        prompt = [FIRST + start, FIRST + goal, 1]
        rows = [[*prompt, *answer] for answer in itertools.product(symbols, repeat=4)]
        walks.update(np.arange(1), SimpleNamespace(greedy_BW=torch.tensor(rows)))  # type: ignore[arg-type]
    shares = walks.compute()
    for share in ("arrival", "legality"):
        assert shares[share] == pytest.approx(shares[f"{share}_chance"]) and shares[share] > 0.02


def test_chance_is_what_random_symbols_reach() -> None:
    task = Navigation(nodes=5, density=1.0)
    random, pairs = np.random.default_rng(0), task._pairs[1]
    symbols, right, n = np.array([END, *range(2 + 5, len(task.symbols))]), 0, 20_000
    for k in range(n):
        start, goal = pairs[k % len(pairs)]
        answer = symbols[random.integers(len(symbols), size=60)].tolist()
        if END in answer:
            right += task.check([2 + start, 2 + goal, 1], answer[: answer.index(END) + 1])
    assert right > 100 and abs(right / n - task.chance) < 5 * (task.chance / n) ** 0.5


def model_outputs(task: Navigation, numbers: np.ndarray, *, knows: bool) -> SimpleNamespace:
    """Of a model that knows the graph, or of a uniform one whose states are noise."""
    batch = AnswerSet(task, 1000, depth=1).batch(numbers)
    tokens, valid = batch.tokens.numpy(), batch.valid(0)
    assert valid is not None
    place = task.world.places(tokens)[:, : batch.seq_len]
    table = torch.full((*place.shape, len(task.symbols)), 1 / len(task.symbols)).double()
    states = np.stack([np.random.default_rng(i).normal(size=(batch.seq_len, 4)) for i in numbers])
    if knows:
        beliefs = np.random.default_rng(7).normal(size=(task.nodes, task.nodes, 4))
        states = beliefs[place, tokens[:, 1:2] - 2]
        for row, at in zip(*np.nonzero(valid.numpy()), strict=True):
            a, b = place[row, at], tokens[row, 1] - 2
            table[row, at] = 0
            if a == b:
                table[row, at, END] = 1
            for c in np.flatnonzero(task.world.edges[a]) if a != b else ():
                if task.world.distances[c, b] == task.world.distances[a, b] - 1:
                    table[row, at, task.world.step_id(c - a)] = (
                        task.world.ways[c, b] / task.world.ways[a, b]
                    )
    ahead = slice(1, batch.seq_len + 1)
    nats = torch.zeros(tokens.shape).double()
    picked = -table.log().gather(-1, batch.tokens[:, ahead].unsqueeze(-1)).squeeze(-1)
    nats[:, ahead] = torch.where(valid, picked, 0)
    of_states = {"states_BPC": torch.tensor(states), "log_probs_KV": table.log()[valid]}
    return SimpleNamespace(batch=batch, greedy_BW=batch.tokens, nats_BW=nats, **of_states)


def measured(task: Navigation, batches: list[np.ndarray], *, knows: bool) -> dict[str, float]:
    measures = task.measures(n=1000, d_model=4)
    for numbers in batches:
        for measure in measures:
            measure.update(numbers, model_outputs(task, numbers, knows=knows))  # type: ignore[arg-type]
    return {name: value for measure in measures for name, value in measure.compute().items()}


def test_a_model_that_knows_the_graph_reaches_every_reference() -> None:
    task = Navigation()
    values = measured(task, [np.arange(200)], knows=True)
    in_two_batches = measured(task, [np.arange(90), np.arange(90, 200)], knows=True)
    assert values == pytest.approx(in_two_batches)
    assert values["legality"] == values["arrival"] == 1 and values["shortcut_mass"] == 0
    assert values["legal_mass"] == pytest.approx(1) and values["belief_cosine"] == pytest.approx(1)
    assert abs(values["belief_cosine_others"]) < 0.1
    assert values["excess_loss"] == pytest.approx(0, abs=1e-12) and values["surprisal"] > 0


def test_a_uniform_model_is_at_chance() -> None:
    task = Navigation()
    values = measured(task, [np.arange(200)], knows=False)
    for name in ("shortcut_mass", "legal_mass"):
        assert values[name] == pytest.approx(values[f"{name}_chance"])
    table, masses = {a: hops(task, a) for a in range(task.nodes)}, []
    for i in range(200):
        _, goal, path = read(task, (e := task.example(i)).prompt, e.answer)
        near = {a for a in table if 2 <= table[a].get(goal, 0) <= 4}
        for a in near.intersection(path):
            shortcuts = near - {a} - set(neighbors(task)[a])
            masses.append(len(shortcuts) / len(task.symbols))
    assert values["shortcut_mass"] == pytest.approx(np.mean(masses)) and np.mean(masses) > 0.05
    assert abs(values["belief_cosine"] - values["belief_cosine_others"]) < 0.1
    assert values["excess_loss"] == pytest.approx(np.log(len(task.symbols)) - values["surprisal"])


def test_belief_cosines_are_means_over_all_pairs_of_states() -> None:
    task, numbers = Navigation(), np.arange(60)
    made = model_outputs(task, numbers, knows=False)
    tokens = made.batch.tokens.numpy()
    rows = []
    for i in numbers:
        example = task.example(int(i))
        start, goal, path = read(task, example.prompt, example.answer)
        assert tokens[i, 0] - 2 == start
        rows += [((a, goal), made.states_BPC[i, 2 + j].numpy()) for j, a in enumerate(path)]
    same: list[float] = []
    others: list[float] = []
    for (a, x), (b, y) in itertools.combinations(rows, 2):
        (same if a == b else others).append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    values = measured(task, [numbers], knows=False)
    assert values["belief_cosine"] == pytest.approx(np.mean(same))
    assert values["belief_cosine_others"] == pytest.approx(np.mean(others))


def test_walks_are_judged_step_by_step() -> None:
    task = Navigation(nodes=12, density=0.8)
    made = model_outputs(task, np.arange(50), knows=True)
    a, b = 0, next(b for b in range(1, 12) if not task.world.edges[0, b])
    c = int(np.flatnonzero(task.world.edges[b])[0])
    made.greedy_BW = torch.full_like(made.batch.tokens, END)
    walk = [2 + a, 2 + c, 1, task.world.step_id(b - a), task.world.step_id(c - b)]
    made.greedy_BW[:, :5] = torch.tensor(walk)
    walks = task.measures(n=50, d_model=4)[0]
    walks.update(np.arange(50), made)  # type: ignore[arg-type]
    values = walks.compute()
    assert values["legality"] == 0.5 and values["arrival"] == 1  # by a shortcut
    assert not task.check(walk[:3], [*walk[3:], END])

"""Every task's examples: pure functions of (seed, index), right by their own check, in bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_modules.tasks import (
    HMM,
    MQAR,
    Copy,
    Countdown,
    Group,
    Induction,
    Polynomial,
    Sat,
    Sibling,
    StarGraph,
    Task,
)
from data_modules.tasks.base import END, Draws
from data_modules.tasks.navigation import Navigation

TASKS: list[Task] = [
    Copy(), Copy(letters=2, shortest=3, periods=5), StarGraph(),
    StarGraph(degree=5, length=3, nodes=20, reverse=True), StarGraph(fixed=3),
    StarGraph(degree=1, length=2, nodes=2), MQAR(),
    MQAR(pairs=4, slots=4, keys=4, values=1, power=1.0), Countdown(),
    Countdown(numbers=2, largest=5), Group(), Group(generators="all", running=False, length=3),
    HMM(), HMM(process="rrxor", length=5), Induction(),
    Induction(sentences=3, names=2, beginnings=2, endings=1), Navigation(),
    Navigation(graph="random", nodes=12, density=0.2), Polynomial(), Polynomial(operations=1),
    Sat(), Sat(variables=3, names=3, solutions=1), Sibling(),
    Sibling(parents=1, children=2, hash=0),
]  # fmt: skip
MANY = 500


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_examples_are_right_and_in_bounds(task: Task) -> None:
    for i in range(MANY):
        example = task.example(i)
        assert task.check(example.prompt, example.answer)
        assert 1 <= len(example.prompt) <= task.longest_prompt
        assert 1 <= len(example.answer) <= task.longest_answer and any(example.asked)
        assert set(example.prompt + example.answer) <= set(range(1, len(task.symbols))) | {END}
        assert (example.answer[-1] == END) == task.ends
        assert len(task.groups(example)) in (0, len(example.answer))
        assert task.show(example.prompt).count(" ") == len(example.prompt) - 1


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_an_example_depends_on_seed_and_index_alone(task: Task) -> None:
    again = replace(task)
    backwards = {i: again.example(i) for i in reversed(range(50))}
    assert [task.example(i) for i in range(50)] == [backwards[i] for i in range(50)]
    assert task.example(1 << 60) == again.example(1 << 60)
    other = replace(task, seed=task.seed + 1)
    assert [task.example(i) for i in range(50)] != [other.example(i) for i in range(50)]


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_wrong_answers_are_refused(task: Task) -> None:
    random = np.random.default_rng(0)
    for i in range(200):
        example = task.example(i)
        answer = list(example.answer)
        place = int(random.choice(np.flatnonzero(example.asked)))
        assert not task.check(example.prompt, answer[:-1])
        assert not task.check(example.prompt, [*answer, answer[-1]])
        assert not task.check(example.prompt, [])
        answer[place] = END if answer[place] != END else 1
        assert not task.check(example.prompt, answer)


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_variants_share_symbols_and_are_larger(task: Task) -> None:
    for variant in task.variants().values():
        assert variant.symbols == task.symbols and variant.name == task.name
        assert variant.longest > task.longest or task.spec()["fixed"]


def test_draws_equal_the_stream_of_numpys_philox() -> None:
    """Draws of any size, between those of other examples."""
    sizes = np.random.default_rng(0)
    key = np.random.SeedSequence(3).generate_state(2, np.uint64)
    indices = [0, 1, (1 << 48) + 5, (1 << 64) - 1, 1 << 64, (1 << 127) + 9]
    draws = [Draws(key, index) for index in indices]
    streams: list[list[int]] = [[] for _ in indices]
    for _ in range(40):
        for one, numbers in zip(draws, streams, strict=True):
            numbers += one.raw(int(sizes.integers(0, 50))).tolist()
    for index, numbers in zip(indices, streams, strict=True):
        plain = np.random.Philox(key=key, counter=index << 128)
        assert numbers == plain.random_raw(len(numbers)).tolist()


# Independent of the tasks' own checks: these tests read what ``show`` writes.


def test_star_graphs_against_brute_force() -> None:
    first = [0, 0, 0]
    for task in (StarGraph(degree=3, length=4, nodes=11), StarGraph(degree=3, nodes=11, fixed=4)):
        for i in range(MANY):
            example = task.example(i)
            graph, question = task.show(example.prompt).split(" / ")
            edges = [tuple(edge.split()) for edge in graph.split(" | ")]
            start, goal, equals = question.split()
            assert equals == "=" and len(set(edges)) == 9
            out: dict[str, list[str]] = {}
            for a, b in edges:
                out.setdefault(a, []).append(b)
            ways = [[start]]
            for _ in range(3):
                ways = [[*way, b] for way in ways for b in out[way[-1]]]
            assert len({node for way in ways for node in way}) == 10
            assert sum(way[-1] == goal for way in ways) == 1 and len(ways) == 3
            way = next(way for way in ways if way[-1] == goal)
            assert task.show(example.answer).split() == way
            for other in ways:
                ids = [task.symbols.index(name) for name in other]
                assert task.check(example.prompt, ids) == (other == way)
            first[[b for a, b in edges if a == start].index(way[1])] += 1
    # The right arm's edge is in no preferred place: 1,000 draws of one in three.
    assert all(abs(n / 1000 - 1 / 3) < 0.06 for n in first)


def test_fixed_graphs_are_few_and_new_ones_many() -> None:
    def graphs(task: Task) -> set[frozenset[str]]:
        prompts = (task.show(task.example(i).prompt).split(" / ")[0] for i in range(MANY))
        return {frozenset(prompt.split(" | ")) for prompt in prompts}

    assert len(graphs(StarGraph(fixed=3))) == 3
    assert len(graphs(StarGraph())) > 0.99 * MANY


def test_reverse_is_the_same_path_backwards() -> None:
    for i in range(100):
        forward, backward = StarGraph().example(i), StarGraph(reverse=True).example(i)
        assert forward.prompt == backward.prompt and forward.answer == backward.answer[::-1]


def test_recall_against_brute_force() -> None:
    task = MQAR(pairs=4, slots=12, keys=9, values=5)
    slots = np.zeros(12)
    for i in range(MANY):
        example = task.example(i)
        words = [*task.show(example.prompt).split(), *task.show(example.answer).split()]
        assert words.index("=") == 8
        value_of = dict(zip(words[:8:2], words[1:8:2], strict=True))
        assert len(value_of) == 4
        asked = []
        for place, is_asked in enumerate(example.asked, start=9):
            if is_asked:
                key = words[place - 1]
                assert words[place] == value_of[key] and (place - 9) % 2 == 1
                asked.append(key)
                slots[(place - 9) // 2] += 1
                back = words[: place - 1][::-1].index(key) + 1
                low, _, high = task.groups(example)[place - 9][9:].partition("-")
                assert int(low) <= back <= int(high or low)
            elif (place - 9) % 2 == 0:
                assert words[place] == "_" or words[place] in value_of
        assert len(asked) == 4 and example.asked[-1]
    random, weights = np.random.default_rng(0), np.arange(1, 13) ** (0.01 - 1)
    drawn = [random.choice(12, 4, replace=False, p=weights / weights.sum()) for _ in range(MANY)]
    expected = np.bincount(np.concatenate(drawn), minlength=12)
    assert np.abs(slots - expected).max() < 0.08 * MANY


def test_copies_against_brute_force() -> None:
    lengths = np.zeros(17)
    for i in range(MANY):
        example = Copy().example(i)
        string, equals = Copy().show(example.prompt).rsplit(" ", 1)
        assert equals == "=" and Copy().show(example.answer) == string
        lengths[len(example.answer)] += 1
    assert lengths[0] == 0 and lengths[1:].min() > 0.4 * MANY / 16


def test_chance_is_what_guessing_reaches() -> None:
    random = np.random.default_rng(0)
    for task in (
        StarGraph(degree=3, length=3),
        Copy(letters=3, periods=3),
        MQAR(pairs=2),
        MQAR(pairs=2, slots=2, keys=2, values=2),
    ):
        right, n = 0, 2000
        for i in range(n):
            example = task.example(i)
            guess = list(example.answer)
            if isinstance(task, StarGraph):
                graph = list(zip(example.prompt[:-3:3], example.prompt[1:-3:3], strict=True))
                for j in (1, 2):
                    ways = [b for a, b in graph if a == guess[j - 1]]
                    guess[j] = int(random.choice(ways))
            elif isinstance(task, Copy):
                guess = random.integers(2, 5, len(guess)).tolist()
            else:
                for j, asked in enumerate(example.asked):
                    guess[j] = int(random.choice(example.prompt[1:-1:2])) if asked else guess[j]
            right += task.check(example.prompt, guess)
        assert abs(right / n - task.chance) < 4 * (task.chance * (1 - task.chance) / n) ** 0.5, task


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StarGraph(nodes=6), ["data.task.nodes=6", "7 nodes"]),
        (lambda: StarGraph(degree=0), ["data.task.degree", "at least 1"]),
        (lambda: StarGraph(length=1), ["data.task.length", "at least 2"]),
        (lambda: StarGraph(fixed=0), ["data.task.fixed", "at least 1"]),
        (lambda: MQAR(slots=7), ["data.task.slots=7", "data.task.pairs=8"]),
        (lambda: MQAR(keys=7), ["data.task.keys=7", "data.task.pairs=8"]),
        (lambda: MQAR(power=0), ["data.task.power"]),
        (lambda: Copy(shortest=3, periods=2), ["data.task.shortest", "data.task.periods=2"]),
        (lambda: Copy(letters=0), ["data.task.letters"]),
        (lambda: Copy(seed=-1), ["data.task.seed"]),
        (lambda: Copy(held_out=1), ["held_out (null for none) must be", "at least 2"]),
        (lambda: Countdown(numbers=1), ["data.task.numbers must be", "at least 2, not 1."]),
        (lambda: Countdown(largest=2.5), ["data.task.largest must be", "at least 2, not 2.5."]),
        (lambda: Group(generators="three"), ["data.task.generators=three is", "of two, all."]),
        (lambda: Group(shortest=17), ["at most data.task.length=16, not 17."]),
        (lambda: Group(length=0), ["data.task.length must be", "at least 1, not 0."]),
        (lambda: HMM(process="even"), ["data.task.process=even is", "one of mess3, rrxor."]),
        (lambda: HMM(length=0), ["data.task.length must be", "at least 1, not 0."]),
        (lambda: HMM(x=0.5), ["data.task.x must be a number in (0, 0.5), not 0.5."]),
        (lambda: HMM(a=1), ["data.task.a must be a number in (0, 1), not 1."]),
        (lambda: Induction(names=1), ["data.task.names must be", "at least 2, not 1."]),
        (lambda: Induction(names=8), ["data.task.sentences=8 may not repeat", "=8 names"]),
        (lambda: Induction(beginnings=2), ["data.task.beginnings=2 are too few for"]),
        (lambda: Induction(endings=0), ["data.task.endings must be", "at least 1, not 0."]),
        (lambda: Navigation(graph="ring"), ["data.task.graph=ring is", "of street, random"]),
        (lambda: Navigation(nodes=3), ["data.task.nodes must be", "at least 4, not 3"]),
        (lambda: Navigation(density=2), ["data.task.density must be a number in [0, 1], not 2"]),
        (lambda: Navigation(training=1.0), ["must be a number in (0, 1), not 1.0"]),
        (lambda: Navigation(detours=0.7, recoveries=0.7), ["their sum must be at most 1"]),
        (lambda: Navigation(graph="random", density=0).example(0), ["0 reachable pairs of nodes"]),
        (lambda: Polynomial(least=0), ["data.task.least must be", "at least 1, not 0."]),
        (lambda: Polynomial(least=6), ["at most data.task.operations=5, not 6."]),
        (lambda: Sat(variables=17), ["data.task.variables must be", "in [3, 16], not 17."]),
        (lambda: Sat(names=7), ["data.task.names=7 are too few for data.task.variables=8"]),
        (lambda: Sat(solutions=0), ["data.task.solutions must be", "at least 1, not 0."]),
        (lambda: Sibling(parents=0), ["data.task.parents must be", "at least 1, not 0."]),
        (lambda: Sibling(children=1), ["data.task.children must be", "at least 2, not 1."]),
        (lambda: Sibling(hash=-1), ["data.task.hash must be", "at least 0, not -1."]),
    ],
)
def test_wrong_options_are_one_sentence(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(part in str(error.value) for part in words) and "\n" not in str(error.value)

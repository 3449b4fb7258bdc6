"""Hidden Markov processes: filtering against the sum over all paths of hidden states."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from data_modules.tasks import HMM
from data_modules.tasks.base import END
from data_modules.tasks.hmm import FIRST, START

BOTH = [HMM(length=6), HMM(process="rrxor", length=6), HMM(length=6, x=0.15, a=0.6)]


def path_probabilities(task: HMM, word: tuple[int, ...]) -> np.ndarray:
    """Probability of a word and each last state, a term for every path of states."""
    n = len(task.stationary)
    probabilities = np.zeros(n)
    for path in product(range(n), repeat=len(word) + 1):
        p = task.stationary[path[0]]
        for symbol, state, after in zip(word, path[:-1], path[1:], strict=True):
            p = p * task.transitions[symbol, state, after]
        probabilities[path[-1]] += p
    return probabilities


def test_the_transitions_are_those_of_the_papers() -> None:
    table = HMM().transitions
    paper = [[0.765, 0.00375, 0.00375], [0.0425, 0.0675, 0.00375], [0.0425, 0.00375, 0.0675]]
    np.testing.assert_allclose(table[0], paper, rtol=1e-12)
    for task in BOTH:
        np.testing.assert_allclose(task.transitions.sum((0, 2)), 1, rtol=1e-14)
        moves = task.transitions.sum(0)
        np.testing.assert_allclose(task.stationary @ moves, task.stationary, atol=1e-14)
    np.testing.assert_allclose(BOTH[1].stationary, [1 / 3, 1 / 6, 1 / 6, 1 / 6, 1 / 6])


@pytest.mark.parametrize("task", BOTH, ids=repr)
def test_filtering_is_the_sum_over_all_paths(task: HMM) -> None:
    for word in product(range(len(task.transitions)), repeat=4):
        ids = [START, *(FIRST + symbol for symbol in word)]
        with np.errstate(divide="ignore", invalid="ignore"):
            joint = np.array([path_probabilities(task, word[:t]) for t in range(5)])
            expected = joint / joint.sum(1, keepdims=True)
            nats = -np.diff(np.log(joint.sum(1)), prepend=0)
        np.testing.assert_allclose(task.beliefs(ids), expected, rtol=1e-10, atol=1e-14)
        possible = np.isfinite(nats)
        surprisals = task.surprisals(ids)
        np.testing.assert_allclose(surprisals[possible], nats[possible], rtol=1e-10, atol=1e-12)
        assert not np.isfinite(surprisals[~possible]).any()


def test_filtering_takes_batches_and_ignores_start_and_end() -> None:
    task = HMM(length=5)
    rows = np.array([[START, *task.example(i).answer, END, END] for i in range(20)])
    beliefs, nats = task.beliefs(rows), task.surprisals(rows)
    for row, belief, nat in zip(rows, beliefs, nats, strict=True):
        np.testing.assert_array_equal(task.beliefs(row), belief)
        np.testing.assert_array_equal(task.surprisals(row), nat)
    np.testing.assert_allclose(beliefs[:, 0], np.broadcast_to(task.stationary, (20, 3)))
    np.testing.assert_allclose(beliefs[:, 5:7], beliefs[:, 6:8])
    assert not nats[:, [0, 6, 7]].any()


@pytest.mark.parametrize("task", BOTH, ids=repr)
def test_examples_have_the_probabilities_of_the_process(task: HMM) -> None:
    words = list(product(range(len(task.transitions)), repeat=3))
    number = {word: i for i, word in enumerate(words)}
    counts = np.zeros((2, len(words)))
    n = 6000
    for i in range(n):
        symbols = [token - FIRST for token in task.example(i).answer]
        counts[0, number[tuple(symbols[:3])]] += 1
        counts[1, number[tuple(symbols[3:])]] += 1
    p = np.array([path_probabilities(task, word).sum() for word in words])
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p) + 1e-9).all()


def entropy(task: HMM, length: int) -> float:
    """Of a word, given the state before it, in nats: over all words."""
    words = product(range(len(task.transitions)), repeat=length)
    nats = 0.0
    for word in words:
        joint = np.eye(len(task.stationary))
        for symbol in word:
            joint = joint @ task.transitions[symbol]
        p = joint.sum(1)
        nats -= task.stationary @ (p * np.log(p, where=p > 0, out=np.zeros_like(p)))
    return float(nats)


def test_late_surprisals_are_the_entropy_rate() -> None:
    """``H(x_n | x_1 .. x_n-1, state before)`` is near it (Cover & Thomas 2006, theorem 4.5.1)."""
    rates = {HMM(process="rrxor", length=1000): 2 / 3 * np.log(2)}
    for task in (HMM(length=1000), HMM(length=1000, x=0.15, a=0.6)):
        rates[task] = entropy(task, 6) - entropy(task, 5)
    for task, rate in rates.items():
        rows = np.array([task.example(i).answer for i in range(100)])
        means = task.surprisals(rows)[:, 200:].mean(1)
        assert abs(means.mean() - rate) < 4 * means.std() / 10 + 1e-4


def test_the_check_accepts_the_possible_strings() -> None:
    for task in BOTH:
        ids = range(FIRST, FIRST + len(task.transitions))
        right = [task.check([START], word) for word in product(ids, repeat=6)]
        assert task.chance == pytest.approx(sum(right) / len(right))
    assert BOTH[0].chance == 1
    rrxor = HMM(process="rrxor", length=9)
    # Two whole triples, at each of the three possible offsets.
    assert rrxor.check([START], [FIRST + b for b in (0, 1, 1, 1, 1, 0, 1, 0, 1)])
    assert rrxor.check([START], [FIRST + b for b in (1, 0, 1, 1, 1, 1, 0, 1, 0)])
    assert not rrxor.check([START], [FIRST + b for b in (1, 1, 1, 1, 1, 1, 1, 1, 1)])

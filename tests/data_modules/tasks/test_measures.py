"""Measures of tasks besides exact match, against numpy on all examples at once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_modules.tasks import HMM, Sibling
from data_modules.tasks.answers import AnswerSet
from data_modules.tasks.data_module import TaskDataModule
from data_modules.tasks.measures import LEAST, AffineProbe, TaskMeasure

C, LENGTH = 6, 9


def outputs(
    task: HMM, numbers: np.ndarray, *, noise: float = 0.3, rank: int = C
) -> SimpleNamespace:
    """States that hold the beliefs nonlinearly, with noise that each example's number seeds."""
    batch = AnswerSet(task, 1000, depth=1).batch(numbers)
    states = []
    for i, row in zip(numbers.tolist(), batch.tokens.numpy(), strict=True):
        random = np.random.default_rng(i)
        beliefs = task.beliefs(row)[: batch.seq_len]
        mixed = np.tanh(3 * beliefs @ np.random.default_rng(99).normal(size=(3, C)))
        mixed += noise * random.normal(size=mixed.shape) + 5
        mixed[:, rank:] = mixed[:, :1]  # the same in several places: no single best map
        states.append(mixed)
    return SimpleNamespace(batch=batch, states_BPC=torch.tensor(np.stack(states)))


def probe_r2(measure: TaskMeasure, task: HMM, batches: list[np.ndarray], **options: float) -> float:
    for numbers in batches:
        measure.update(numbers, outputs(task, numbers, **options))  # type: ignore[arg-type]
    return measure.compute()["belief_r2"]


def lstsq_r2(task: HMM, n: int, *, part: int, **options: float) -> float:
    """With numpy, on all positions at once; fitted on the even or odd examples."""
    made = outputs(task, np.arange(n), **options)  # type: ignore[arg-type]
    valid = made.batch.valid(0)
    assert valid is not None
    beliefs = task.beliefs(made.batch.tokens.numpy())[:, : made.batch.seq_len]
    masks = [valid.numpy() & (np.arange(n) % 2 == of)[:, None] for of in (part, 1 - part)]
    (x, y), (x_new, y_new) = ((made.states_BPC.numpy()[mask], beliefs[mask]) for mask in masks)
    weights, *_ = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=LEAST)
    error = ((y_new - y.mean(0) - (x_new - x.mean(0)) @ weights) ** 2).sum()
    return float(1 - error / ((y_new - y_new.mean(0)) ** 2).sum())


def probe(task: HMM) -> TaskMeasure:
    return AffineProbe("belief_r2", task.beliefs, size=len(task.stationary), d_model=C)


@pytest.mark.parametrize("rank", [C, 4])
@pytest.mark.parametrize("noise", [0.0, 0.3, 100.0])
def test_the_probe_against_numpy(noise: float, rank: int) -> None:
    task = HMM(length=LENGTH)
    options = {"noise": noise, "rank": rank}
    batches = [np.arange(1, 30, 3), np.arange(2, 30, 3), np.arange(0, 30, 3), np.array([30])]
    r2 = probe_r2(probe(task), task, batches, **options)
    assert r2 == pytest.approx(lstsq_r2(task, 31, part=0, **options), abs=1e-9)
    # It is scored on other examples than it is fitted on.
    assert abs(r2 - lstsq_r2(task, 31, part=1, **options)) > 1e-6
    low, high = {0.0: (0.9, 1.0), 0.3: (0.4, 0.95), 100.0: (-1.0, 0.1)}[noise]
    assert low < r2 < high


def test_the_probe_ignores_variation_as_small_as_rounding() -> None:
    """Otherwise the probe would depend on the batch size."""
    task, numbers = HMM(length=LENGTH), np.arange(30)
    exact, rounded = probe(task), probe(task)
    made = outputs(task, numbers, rank=3)
    exact.update(numbers, made)
    generator = torch.Generator().manual_seed(0)
    made.states_BPC += 1e-6 * torch.randn(made.states_BPC.shape, generator=generator)
    rounded.update(numbers, made)
    assert rounded.compute() == pytest.approx(exact.compute(), abs=1e-5)


def test_the_probe_needs_two_parts_and_beliefs_that_vary() -> None:
    task = HMM(length=LENGTH)
    alone = probe(task)
    alone.update(np.array([0]), outputs(task, np.array([0])))
    assert alone.compute() == {}
    short = HMM(length=1)  # the belief before the first symbol is always the same
    nothing = probe(short)
    nothing.update(np.arange(8), outputs(short, np.arange(8)))
    assert nothing.compute() == {}


@pytest.mark.parametrize("process", ["mess3", "rrxor"])
def test_excess_loss_is_measured_from_the_surprisal_of_the_process(process: str) -> None:
    task, n = HMM(process=process, length=LENGTH), 20
    _, excess = task.measures(n=n, d_model=C)
    surprisals, nats = [], []
    for numbers in (np.arange(0, 13), np.arange(13, n)):
        batch = AnswerSet(task, n, depth=1).batch(numbers)
        made = torch.tensor(np.random.default_rng(0).exponential(size=batch.tokens.shape))
        excess.update(numbers, SimpleNamespace(batch=batch, nats_BW=made))
        for row, i in enumerate(numbers.tolist()):
            example = task.example(i)
            # The probability of the whole string, by the forward algorithm.
            belief = task.stationary
            for token in example.answer:
                belief = belief @ task.transitions[token - 2]
            surprisals.append(-np.log(belief.sum()))
            nats.append(float(made[row, 1 : LENGTH + 1].sum()))
    least = sum(surprisals) / (n * LENGTH)
    assert excess.compute() == pytest.approx(
        {"surprisal": least, "excess_loss": sum(nats) / (n * LENGTH) - least}, rel=1e-12
    )


def test_the_creativity_of_samples() -> None:
    task = Sibling(parents=3, children=4, hash=2)
    training = [task.example(i).answer for i in range(10)]
    siblings = {frozenset(answer) for answer in training}
    new = next(a for i in range(100) if frozenset(a := task.example(i).answer) not in siblings)
    one, other, parent = training[0]  # in the other order they are the same siblings
    samples = [new, [new[1], new[0], new[2]], [other, one, parent], [1, 2, 3], [new[0], *new[::2]]]
    (measure,) = task.measures(n=5, d_model=C, training=lambda: training)
    prompt = [2, 3, 1]
    for numbers in (np.array([3, 1]), np.array([0, 4, 2])):  # whatever the order
        rows = torch.tensor([[*prompt, *samples[i], 0] for i in numbers])
        measure.update(numbers, SimpleNamespace(sampled_BW=rows))
    shares = {"sampled_coherent": 3 / 5, "sampled_distinct": 2 / 5}
    assert measure.compute() == shares | {"creativity": 1 / 5}
    (fresh,) = task.measures(n=5, d_model=C)
    rows = torch.tensor([[*prompt, *s, 0] for s in samples])
    fresh.update(np.arange(5), SimpleNamespace(sampled_BW=rows))
    assert fresh.compute() == shares


def test_the_training_set_is_what_the_loader_reads() -> None:
    data = TaskDataModule(Sibling(hash=2), examples=37, batch_size=4, seq_len=11, seed=5)
    training = data.answer_sets[""].training
    assert training is not None
    read = set()
    for batch in data.train_dataloader():
        for row, scored in zip(batch.tokens, batch.scored, strict=True):
            answers = row[scored].tolist()
            read |= {tuple(answers[i : i + 3]) for i in range(0, len(answers), 3)}
    assert read <= {tuple(answer) for answer in training()} and len(training()) == 37
    assert len(read) > 20
    assert TaskDataModule(Sibling(hash=2)).answer_sets[""].training is None


def test_each_example_has_its_own_uniform_numbers() -> None:
    questions = AnswerSet(Sibling(), 50, depth=2)
    wide = questions.uniforms(np.arange(50), 30)
    assert torch.equal(questions.uniforms(np.array([7, 3]), 20), wide[[7, 3], :20])
    assert wide.unique().numel() == wide.numel() and wide.min() >= 0 and wide.max() < 1
    other = AnswerSet(Sibling(seed=1), 50, depth=2).uniforms(np.arange(50), 30)
    assert not torch.isin(other, wide).any()

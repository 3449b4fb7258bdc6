"""Answers of whole batches against loops that decode, judge and count one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from data_modules.tasks import MQAR, Copy, StarGraph
from data_modules.tasks.answers import AnswerSet
from data_modules.tasks.base import END, Example, Task
from data_modules.windows import WindowBatch
from mtp_lightning.callbacks.exact_match import answer_all
from mtp_lightning.decoding.answers import ModelOutputs, generate_scored
from mtp_lightning.metrics.answers import AnswerRates
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.teacherless import TeacherlessConfig
from tests.decoding.models import small_model
from tests.models import build

D = 2


@dataclass(frozen=True, kw_only=True)
class Count(Task):
    """An answer of at most as many ones as the prompt has, and an end: several are right."""

    name: ClassVar[str] = "count"
    ends: ClassVar[bool] = True
    symbols = (".", "1")
    longest_prompt = 6
    longest_answer = 7
    chance = 0.5

    def example(self, index: int) -> Example:
        n = 1 + self.draws(index).below(6)
        return Example([1] * n, [1] * n + [END])

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        n = len(answer) - 1
        return 0 <= n <= len(prompt) and list(answer) == [1] * n + [END]


TASKS: list[Task] = [Copy(periods=6), StarGraph(), MQAR(pairs=3, slots=6), Count()]


def model_for(task: Task, **options) -> MTPModel:
    return small_model(3, D, vocab=len(task.symbols), **options)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def logits_after(model: MTPModel, tokens: list[int]) -> torch.Tensor:
    """The logits of a pass over the whole text."""
    rows = torch.tensor([tokens + [0] * (model.depth + 1)])
    scored = torch.zeros_like(rows, dtype=torch.bool)  # read by models that need a task
    batch = WindowBatch(rows, model.depth, scored=scored)
    return model.head(model(batch, ())[0][0, len(tokens) - 1])


def decode_one_by_one(model: MTPModel, task: Task, example: Example) -> list[int]:
    """One token after the other, each from a pass over the whole text."""
    text = list(example.prompt)
    limit = task.longest_answer if task.ends else len(example.answer)
    for i in range(limit):
        given = not task.ends and not example.asked[i]
        text.append(example.answer[i] if given else int(logits_after(model, text).argmax()))
        if task.ends and text[-1] == END:
            break
    return text[len(example.prompt) :]


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_batched_answers_equal_a_naive_decode(task: Task) -> None:
    model = model_for(task)
    questions = AnswerSet(task, 30, depth=D)
    numbers = np.arange(30)
    answers_BW = generate_scored(model, questions.batch(numbers))
    right = questions.right(numbers, answers_BW)
    for i, example in enumerate(questions.examples):
        answer = decode_one_by_one(model, task, example)
        assert questions.answer(i, answers_BW[i].tolist()) == answer
        assert bool(right[i]) == task.check(example.prompt, answer)
    # A row's answer does not depend on the other rows.
    two = np.array([4, 17])
    batch = questions.batch(two)
    assert torch.equal(generate_scored(model, batch), answers_BW[two][:, : batch.tokens.shape[1]])


@pytest.mark.parametrize(
    ("task", "blind"), [*((task, False) for task in TASKS), (StarGraph(), True), (MQAR(), True)]
)
def test_sampled_answers_equal_those_of_a_loop(task: Task, blind: bool) -> None:
    """The loop draws each token by its uniform number from a pass over the whole text."""
    model = model_for(task)
    if blind:
        model = build(model.config.trunk, TeacherlessConfig(), 0).eval()
    questions = AnswerSet(task, 12, depth=model.depth)
    numbers = np.arange(12)
    batch = questions.batch(numbers)
    assert batch.scored is not None
    uniforms = questions.uniforms(numbers, batch.tokens.shape[1])
    sampled = generate_scored(model, batch, uniforms)
    assert not torch.equal(sampled, generate_scored(model, batch))
    for row, scored in enumerate(batch.scored.tolist()):
        text = batch.tokens[row].tolist()
        for i in range(max(j for j, s in enumerate(scored) if s) + 1):
            if scored[i]:
                read = [0 if s and blind else t for t, s in zip(text, scored, strict=True)]
                p = logits_after(model, read[:i]).double().softmax(-1).cumsum(0).numpy()
                text[i] = int(np.searchsorted(p, float(uniforms[row, i]) * p[-1], side="right"))
                assert int(sampled[row, i]) == text[i]
    two = np.array([7, 2])  # a row's sample does not depend on the other rows
    part = questions.batch(two)
    width = part.tokens.shape[1]
    assert torch.equal(
        generate_scored(model, part, questions.uniforms(two, width)), sampled[two][:, :width]
    )


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_choices_nats_and_states_equal_those_of_a_loop(task: Task) -> None:
    model, questions = model_for(task), AnswerSet(task, 5, depth=D)
    batch = questions.batch(np.arange(5))
    outputs = ModelOutputs(model, batch, lambda: torch.empty(0))
    assert batch.scored is not None
    for row, scored in enumerate(batch.scored.tolist()):
        text = batch.tokens[row].tolist()
        for i, is_scored in enumerate(scored):
            nats = float(outputs.nats_BW[row, i])
            if is_scored:
                logits = logits_after(model, text[:i])
                expected = -float(logits.double().log_softmax(-1)[text[i]])
                assert nats == pytest.approx(expected, abs=1e-4)
                assert int(outputs.forced_BW[row, i]) == int(logits.argmax())
                read = model.head(outputs.states_BPC[row, i - 1])
                torch.testing.assert_close(read, logits, rtol=1e-4, atol=1e-4)
            else:
                assert nats == 0 and int(outputs.forced_BW[row, i]) == text[i]


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_rates_equal_those_of_a_loop(task: Task) -> None:
    """The model is right two times in three."""
    questions, random = AnswerSet(task, 40, depth=D), np.random.default_rng(0)
    rates = AnswerRates(questions.n_positions, questions.group_names)
    counts: dict[str, list[bool]] = {}
    for numbers in (np.arange(0, 25), np.arange(25, 40)):
        batch = questions.batch(numbers)
        wrong = torch.from_numpy(random.random((2, *batch.tokens.shape)) < 0.1)
        assert batch.scored is not None
        wrong &= batch.scored
        decoded, forced = ((batch.tokens + w) % len(task.symbols) for w in wrong)
        right = questions.right(numbers, decoded)
        rates.update(
            right,
            decoded,
            forced,
            batch.tokens,
            *questions.answer_positions(numbers, batch.tokens.shape[1]),
        )
        for row, i in enumerate(numbers.tolist()):
            example, ordinal = questions.examples[i], 0
            names = task.groups(example)
            for j, asked in enumerate(example.asked):
                if not asked:
                    continue
                ordinal += 1
                at = len(example.prompt) + j
                for key, tokens in (("", decoded), ("forced_", forced)):
                    tag = f"{key}accuracy_position_{ordinal}"
                    counts.setdefault(tag, []).append(bool(tokens[row, at] == example.answer[j]))
                if names:
                    hit = bool(decoded[row, at] == example.answer[j])
                    counts.setdefault(f"accuracy_{names[j]}", []).append(hit)
            answer = questions.answer(i, decoded[row].tolist())
            counts.setdefault("exact_match", []).append(task.check(example.prompt, answer))
    expected = {tag: sum(hits) / len(hits) for tag, hits in counts.items()}
    assert rates.compute() == pytest.approx(expected)
    assert 0.1 < expected["exact_match"] < 1


def test_far_positions_share_a_tag() -> None:
    rates = AnswerRates(40, [])
    tokens = torch.zeros(1, 40, dtype=torch.int64)
    answers = (torch.arange(40) >= 20).long().unsqueeze(0)
    place = torch.arange(40).unsqueeze(0)
    rates.update(torch.tensor([False]), answers, answers, tokens, place, torch.full_like(place, -1))
    values = rates.compute()
    assert values["accuracy_position_16"] == 1 and values["accuracy_position_17-32"] == 4 / 16
    assert values["accuracy_position_33-40"] == 0 and "accuracy_position_17" not in values


def test_two_ranks_together_give_the_rates_of_one() -> None:
    task = StarGraph()
    model, sets = model_for(task), {"": AnswerSet(task, 21, depth=D)}
    whole = answer_all(model, sets)
    parts = [answer_all(model, sets, rank=rank, world=2, batch_size=4) for rank in range(2)]
    for tag, value in whole.items():
        assert value == pytest.approx((11 * parts[0][tag] + 10 * parts[1][tag]) / 21), tag

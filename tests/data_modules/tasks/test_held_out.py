"""The share of validation that training alone answers: zero, or logged as a baseline."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import yaml

import data_modules.tasks as tasks
from data_modules.tasks import (
    HMM,
    MQAR,
    Copy,
    Countdown,
    Example,
    Group,
    Induction,
    Polynomial,
    Sat,
    Sibling,
    StarGraph,
    Task,
)
from data_modules.tasks.data_module import TaskDataModule
from mtp_lightning.paths import CONF, ROOT

NAMES = (
    "copy", "countdown", "group", "hmm", "induction", "mqar", "polynomial", "sat", "sibling",
    "star_graph",
)  # fmt: skip
HELD_OUT = ("copy", "group", "polynomial")
SMALL: list[Task] = [
    Copy(letters=2, periods=6), Countdown(numbers=2, largest=5), Group(length=6), HMM(length=3),
    Induction(sentences=3, names=2, beginnings=2, endings=2),
    MQAR(pairs=2, slots=2, keys=2, values=2), Polynomial(operations=1), Sat(variables=3, names=3),
    Sibling(parents=2, children=3), StarGraph(length=2, nodes=4),
]  # fmt: skip


def configured_task(name: str) -> Task:
    """A task by the options of conf/data/NAME.yaml."""
    options = yaml.safe_load((CONF / "data" / f"{name}.yaml").read_text())["task"]
    return getattr(tasks, options.pop("_target_").split(".")[-1])(**options)  # type: ignore[no-any-return]


def of_training(task: Task, seed: int, n: int) -> list[Example]:
    return [task.example(((seed + 1) << 48) + i) for i in range(n)]


def asked_tokens(example: Example) -> list[int]:
    return [t for t, asked in zip(example.answer, example.asked, strict=True) if asked]


def with_answers(example: Example, tokens: list[int]) -> list[int]:
    answer, tokens = list(example.answer), list(tokens)
    for place in np.flatnonzero(example.asked):
        answer[place] = tokens.pop(0) if tokens else 0
    return answer


def most_frequent(values: list[Any]) -> Any:
    """The most frequent one, the first of several."""
    return max(dict.fromkeys(values), key=values.count) if values else None


def baselines_of(task: Task, examples: list[Example], training: list[Example]) -> dict[str, float]:
    """By looking through all of training for every example."""

    def question(example: Example) -> tuple[list[int], list[int]]:
        return example.prompt, with_answers(example, [-1] * len(asked_tokens(example)))

    def content(example: Example) -> Any:
        if isinstance(task, Sibling):
            return sorted(example.answer)
        if isinstance(task, StarGraph):
            graph, _, ends = task.show(example.prompt).partition(" / ")
            return sorted(graph.split(" | ")), ends
        return example.answer if isinstance(task, HMM) else question(example)

    seen, right = 0, [0, 0, 0]
    for example in examples:
        seen += any(content(other) == content(example) for other in training)
        n = len(asked_tokens(example))
        answers = [tuple(asked_tokens(other)) for other in training]
        constant = most_frequent([answer for answer in answers if len(answer) == n]) or ()
        by_place = [most_frequent([a[i] for a in answers if len(a) > i]) or 0 for i in range(n)]
        pairs = zip(answers, training, strict=True)
        known = [answer for answer, other in pairs if question(other) == question(example)]
        for i, answer in enumerate((constant, by_place, most_frequent(known) or constant)):
            right[i] += task.check(example.prompt, with_answers(example, list(answer)))
    return {"seen": seen / len(examples), "trivial": max(right) / len(examples)}


@pytest.mark.parametrize("name", NAMES)
def test_validation_questions_are_not_in_training(name, monkeypatch):
    """Or the share is logged, with the best strategy that does not know the task."""
    monkeypatch.setattr("data_modules.tasks.answers.TRIED", 400)
    task = configured_task(name)
    training = {tuple(e.prompt) for seed in (0, 5) for e in of_training(task, seed, 400)}
    validation = {tuple(task.example(i).prompt) for i in range(256)}
    share = len(validation & training) / len(validation)
    baselines = TaskDataModule(task).answer_sets[""].baselines
    assert baselines.keys() == {"chance", "seen", "trivial"}
    if name in HELD_OUT:
        assert share == 0 == baselines["seen"] and baselines["trivial"] < 0.01
    elif name in ("hmm", "induction"):  # all have the same prompt, and only answers differ
        assert share == 1 and baselines["seen"] < 0.01
    elif name == "sibling":
        assert baselines["seen"] > 0 and baselines["trivial"] == 1
    else:
        assert share == 0 == baselines["seen"] and baselines["trivial"] < 0.05


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_baselines_against_brute_force(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_modules.tasks.answers.TRIED", 150)
    sets = TaskDataModule(task, eval_examples=40, seed=3).answer_sets
    by_hand = baselines_of(task, [task.example(i) for i in range(40)], of_training(task, 3, 150))
    assert sets[""].baselines == {"chance": task.chance, **by_hand}
    assert by_hand["seen"] > 0 or isinstance(task, Induction | Polynomial | Sat)
    for name, questions in sets.items():
        assert not name or questions.baselines == {"chance": questions.task.chance}


def test_baselines_of_a_fixed_training_set_against_brute_force() -> None:
    task = Sibling(parents=2, children=3)
    baselines = TaskDataModule(task, examples=4, eval_examples=50, seed=3).answer_sets[""].baselines
    by_hand = baselines_of(task, [task.example(i) for i in range(50)], of_training(task, 0, 4))
    assert {key: baselines[key] for key in by_hand} == by_hand and 0 < baselines["seen"] < 1


@pytest.mark.parametrize("generators, deciding", [("two", 8), ("all", 2)])
def test_no_training_word_begins_with_a_validation_word(generators: str, deciding: int) -> None:
    """Its running products would be the answer."""
    task = Group(generators=generators, held_out=16)
    prompts = [example.prompt for example in of_training(task, 0, 2000)]
    beginnings = {tuple(prompt[:i]) for prompt in prompts for i in range(1, len(prompt))}
    for i in range(256):
        prompt = task.example(i).prompt
        assert len(prompt) > deciding and tuple(prompt[:deciding]) not in beginnings
    lengths = {len(e.prompt) - 1 for e in of_training(task, 0, 1000)}
    assert lengths == set(range(1, 17)), "training has the short ones"


@pytest.mark.parametrize("name", HELD_OUT)
def test_the_option_held_out_decides_the_share_of_questions(name: str) -> None:
    task = configured_task(name)
    unrestricted = type(task)()
    held_out = sum(task.is_held_out(unrestricted.example(i).prompt) for i in range(4000))
    share = 9 / 16 if name == "group" else 1  # of words, those that have eight letters
    assert abs(held_out / 4000 - share / 16) < (0.02 if name == "group" else 0.015)


def test_chance_is_that_of_the_lengths_in_validation() -> None:
    task = Copy(letters=3, periods=4, held_out=4)
    lengths = [len(task.example(i).answer) for i in range(4000)]
    assert task.chance == pytest.approx(np.mean([3.0**-n for n in lengths]), rel=0.2)
    assert Group(held_out=16).chance < 60.0**-7
    assert Group(held_out=16, running=False).chance == pytest.approx(1 / 60)


def test_the_page_has_the_chance_of_every_task() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text().split("\n## ")[1]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    stated = {row[0].strip("| `"): row[3] for row in rows if row[0] != "| `data=`"}
    assert stated.keys() == {*NAMES, "navigation"}
    for name, text in stated.items():
        share = float(Fraction(text.removesuffix(" %"))) / (100 if "%" in text else 1)
        assert configured_task(name).chance == pytest.approx(share, rel=0.5, abs=1e-7), name


def test_a_task_with_too_few_questions_to_hold_out_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no question of data=copy to"):
        TaskDataModule(Copy(letters=1, periods=1, held_out=9))


def test_rare_questions_are_found_for_every_example() -> None:
    """Of these words, 1 in 1,024 has 8 letters of the two that are held out."""
    task = Group(length=8, held_out=64)
    assert task.is_held_out(task.example(469).prompt)  # takes more than 6,400 draws


def windows_digest(task: Task, seed: int) -> str:
    """Hex digest of the first windows of a run and of its validation."""
    data = TaskDataModule(task, seed=seed, depth=3)
    digest = hashlib.sha256()
    for windows in (data.train_dataloader().dataset, data.evaluation):
        batch = windows[np.arange(100)]
        assert batch.scored is not None
        digest.update(batch.tokens.numpy().tobytes() + batch.scored.numpy().tobytes())
    return digest.hexdigest()[:16]


def test_the_examples_of_stored_runs_never_change() -> None:
    """With the options that claims have run, and without the key that holds questions out."""
    assert {task: (windows_digest(task, 0), windows_digest(task, 7)) for task in STORED} == STORED
    assert configured_task("star_graph") == StarGraph(), "what planning claims have run"
    assert {task: task.fingerprint() for task in FINGERPRINTS} == FINGERPRINTS


STORED: dict[Task, tuple[str, str]] = {
    StarGraph(): ("3774faea364e732e", "5fe071854489b166"),
    MQAR(pairs=4, slots=8, keys=16, values=16): ("7a32fe93388bf50e", "d49890de33f34b75"),
    Copy(): ("e641b754c0635a13", "ed628a89082baaba"),
    Group(): ("f81ada23ae501c5a", "384568e797079adc"),
    Polynomial(): ("14f384192938858b", "88a7a853d7fc4d05"),
    Countdown(): ("598a35df96e6ac16", "dca8d0483f4a166d"),
    StarGraph(fixed=3): ("2ba501a8eb2ad5c3", "70880f8765765ca1"),
    HMM(): ("306ef0d574c34aaf", "bb1377b2ffcb04eb"),
    HMM(process="rrxor"): ("4f66e8d5e5e32645", "2405b7d76d2fd1b5"),
    Induction(): ("b9018864a2de1fea", "58f38193412e17bb"),
    Sat(): ("2b1099ca92c3bae6", "6f60c57f32a4ca79"),
    Sibling(): ("1834bd02f97ace11", "e6c1414da5697717"),
}
FINGERPRINTS: dict[Task, str] = {
    StarGraph(): "defd09eb0ed9b65c89d6e0722b02987f",
    MQAR(): "c25de1d77eacd885b24f4ddd7faadf57",
    Copy(): "393a5aef85694190e7d9976896be92de",
    Group(): "0bc51de5d0d7ca29735ce449205fd7ef",
    Polynomial(): "5238fae057c455cf976a9ae12b8f444c",
}

"""Windows of whole examples: targets, attention between examples, and the order of batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data_modules import loader as loader_module
from data_modules.tasks import MQAR, Copy, StarGraph, Task
from data_modules.tasks.base import END
from data_modules.tasks.data_module import TaskDataModule
from data_modules.windows import WindowBatch
from tests.data_modules.loaders import stream
from tests.models import target_counts

# torch warns on a machine with one core.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

TASKS: list[Task] = [Copy(periods=5), StarGraph(), MQAR(pairs=3, slots=5)]


def module(task: Task, **options: Any) -> TaskDataModule:
    return TaskDataModule(task, **{"batch_size": 4, **options})


def same(a: WindowBatch, b: WindowBatch) -> bool:
    pairs = zip((a.tokens, a.scored), (b.tokens, b.scored), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("train_prompt", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("per_window", [1, 3])
@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_targets_against_a_loop(task, per_window, depth, train_prompt):
    seq_len = per_window * task.longest - 1 + (per_window > 1)
    data = module(task, seq_len=seq_len, depth=depth, train_prompt=train_prompt)
    windows = data.train_dataloader().dataset
    numbers = np.array([0, 1, 7])
    batch = windows[numbers]
    assert batch.tokens.shape == (3, seq_len + depth + 1) and batch.depth == depth
    assert (batch.documents is None) == (per_window == 1)
    for row, number in enumerate(numbers):
        # (token, number of its example, whether it may be a target), in order.
        layout: list[tuple[int, int, bool]] = []
        for i in range(per_window):
            example = task.example(windows.first + int(number) * per_window + i)
            layout += [(token, i, train_prompt) for token in example.prompt]
            layout += [
                (token, i, train_prompt or asked)
                for token, asked in zip(example.answer, example.asked, strict=True)
            ]
        layout += [(END, per_window, False)] * (batch.tokens.shape[1] - len(layout))
        assert batch.tokens[row].tolist() == [token for token, _, _ in layout]
        for k in range(depth + 1):
            for i in range(seq_len):
                token, owner, scored = layout[i + k + 1]
                # In a shared window, an example predicts only its own tokens.
                counts = scored and (per_window == 1 or layout[i][1] == owner)
                assert int(batch.targets(k)[row, i]) == (token if counts else -100)
    assert not train_prompt or int(target_counts(batch)[0]) > 0


def test_packed_examples_do_not_attend_to_each_other() -> None:
    """Examples next to it in the window do not change a model's states."""
    from mtp_lightning.mtp.parallel import ParallelConfig
    from mtp_lightning.nn.config import TrunkConfig
    from tests.models import build

    task = StarGraph()
    trunk = TrunkConfig(
        n_layers=2, n_heads=2, n_kv_heads=2, d_model=16, d_ff=24, vocab_size=len(task.symbols)
    )
    model = build(trunk, ParallelConfig(depth=2), 0).eval()
    one = module(task, depth=2).train_dataloader().dataset[np.arange(3)]
    packed = module(task, depth=2, seq_len=74).train_dataloader().dataset[np.arange(1)]
    with torch.no_grad():
        alone, together = model(one), model(packed)
    for k in range(3):
        for i in range(3):
            valid = one.valid(k)
            assert valid is not None
            n = int(valid[i].nonzero().max()) + 1
            states = together[k][0, 25 * i : 25 * i + n]
            assert torch.allclose(states, alone[k][i, :n], atol=1e-5)


@pytest.mark.parametrize("examples", [None, 50])
@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_ranks_and_workers_read_the_same_batches(monkeypatch, task, examples):
    def first(n: int, **options: Any) -> list[WindowBatch]:
        batches = iter(module(task, examples=examples, seed=3, **options).train_dataloader())
        return [next(batches) for _ in range(n)]

    whole = first(6, batch_size=8)
    assert all(map(same, whole, first(6, batch_size=8, num_workers=2)))
    for rank in range(2):
        monkeypatch.setattr(loader_module, "_world", lambda rank=rank: (rank, 2))
        for batch, part in zip(whole, first(6, batch_size=4), strict=True):
            assert torch.equal(batch.tokens[4 * rank : 4 * rank + 4], part.tokens)


def test_fresh_examples_never_repeat_and_exclude_validation() -> None:
    task = StarGraph()

    def seen(seed: int, n: int) -> set[tuple[int, ...]]:
        data = module(task, seed=seed, batch_size=50)
        batches = iter(data.train_dataloader())
        return {tuple(row) for _ in range(n) for row in next(batches).tokens.tolist()}

    validation = module(task, eval_examples=200)
    held_out = {tuple(row) for b in validation.val_dataloader() for row in b.tokens.tolist()}
    assert len(held_out) == 200
    trained = [seen(seed, 20) for seed in (0, 1, 2, 10**12)]
    for i, one in enumerate(trained):
        assert len(one) == 1000 and not one & held_out
        assert not any(one & other for other in trained[:i])


def test_validation_is_the_same_for_every_seed_and_window() -> None:
    answers = []
    for options in ({}, {"seed": 5}, {"seq_len": 99, "depth": 2}):
        data = module(Copy(), eval_examples=70, **options)
        targets = [b.targets(0)[b.targets(0) >= 0] for b in data.val_dataloader()]
        answers.append(torch.cat(targets))
        assert data.evaluation_summary()["tokens"] == len(answers[-1])
    assert all(torch.equal(answers[0], other) for other in answers)


@pytest.mark.parametrize("examples", [None, 30])
def test_resumes_with_the_next_batch(examples: int | None) -> None:
    def loader(seed: int) -> Any:
        return module(MQAR(), examples=examples, seed=seed).train_dataloader()

    batches = stream(loader(7), 20)  # a fixed set of 30 has 7 batches an epoch
    for stop in (1, 6, 7, 8, 13):
        broken = loader(7)
        stream(broken, stop)
        resumed = loader(0)  # continues with the seed that it began with
        resumed.load_state_dict(broken.state_dict())
        assert same(next(iter(resumed)), batches[stop]), stop


def test_a_fixed_set_is_read_whole_and_the_same_for_every_seed() -> None:
    def epoch(seed: int) -> list[tuple[int, ...]]:
        loader = module(Copy(), examples=40, seed=seed).train_dataloader()
        return [tuple(row) for batch in loader for row in batch.tokens.tolist()]

    assert epoch(0) != epoch(1) and sorted(epoch(0)) == sorted(epoch(1))
    assert len(epoch(0)) == 40


def test_a_padding_window_has_no_target() -> None:
    windows = module(Copy(), eval_examples=6).evaluation
    assert int(target_counts(windows[np.array([6])]).sum()) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_len": 23}, ["data.seq_len=23", "25 tokens", "24 or more"]),
        ({"document_mask": True}, ["data.document_mask", "leave it out"]),
        ({"examples": 0}, ["data.examples"]),
        ({"eval_examples": 0}, ["data.eval_examples"]),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        module(StarGraph(), **options)
    assert all(part in str(error.value) for part in words) and "\n" not in str(error.value)


def test_too_few_examples_for_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="data.examples=3 fill 3 windows but one step takes 8"):
        module(StarGraph(), examples=3, accumulate=2).prepare()


def test_another_vocabulary_is_refused() -> None:
    tokenizer = module(StarGraph(nodes=13)).tokenizer
    with pytest.raises(ValueError, match="its 16 symbols .* has 17 ids"):
        TaskDataModule(StarGraph(), tokenizer)
    TaskDataModule(StarGraph(degree=3), module(StarGraph()).tokenizer)


def test_the_tokenizer_of_a_task_is_lossless() -> None:
    from data_modules.tokenizers import tokenizer_from_state

    tokenizer = tokenizer_from_state(module(StarGraph()).tokenizer.state())
    example = StarGraph().example(0)
    text = tokenizer.decode(example.prompt)
    assert text.split() == StarGraph().show(example.prompt).split()
    assert tokenizer.encode(text).tolist() == example.prompt
    assert b"".join(tokenizer.token_bytes()[i] for i in example.prompt).decode() == text
    with pytest.raises(ValueError, match="'hello' is not a symbol"):
        tokenizer.encode("0 hello 1")
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(tokenizer.library_json())
    assert library.encode(text).ids == example.prompt


def test_held_out_prompts_are_whole_with_answers_of_one_length() -> None:
    data = module(Copy(periods=5), eval_examples=60)
    prompts = data.held_out_prompts(4, 2)
    assert data.answer_length == 5 and {len(prompt) for prompt in prompts} == {6}
    recall = module(MQAR(pairs=3, slots=5), eval_examples=10)
    assert recall.answer_length == 1
    examples = recall.answer_sets[""].examples
    for prompt, example in zip(recall.held_out_prompts(10), examples, strict=True):
        # Up to the first query, which is one of the keys.
        assert int(prompt[-1]) in example.prompt[:-1:2] and len(prompt) % 2 == 0
    with pytest.raises(ValueError, match="11 prompts were .* only 10 of data.eval_examples=10"):
        recall.held_out_prompts(11)
    assert len(recall.held_out_prompts(11, fewer=True)) == 10

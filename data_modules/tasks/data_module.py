"""The LightningDataModule of a task."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from data_modules.digests import digest
from data_modules.tasks.answers import AnswerSet
from data_modules.tasks.base import Example, Task
from data_modules.tasks.windows import TaskWindows, first_training_index
from data_modules.tokenizers.base import Tokenizer
from data_modules.tokenizers.symbols import SymbolTokenizer
from data_modules.window_module import WindowDataModule
from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_whole


class TaskDataModule(WindowDataModule):
    """Windows of whole examples; only their answers are trained and evaluated.

    Training reads fresh examples, or the same ``examples`` ones repeatedly; validation reads the
    first ``eval_examples`` of the task, which no training reads, whatever the run's seed.

    Args:
        tokenizer: the stored tokenizer of the run that is evaluated; it must have the task's
            symbols.
        seq_len: T; None for the tokens of the longest example but its last, which is only a
            target. A longer window holds several examples, none of which sees the others.
        examples: size of the training set; None for fresh examples without end.
        eval_examples: size of the validation set, and of each out-of-distribution set.
        train_prompt: whether prompts are trained too.
        document_mask: must be false, since examples are separate anyway.
        options: other options of :class:`WindowDataModule`.

    Raises:
        UserError: for numbers out of range, a window too short for an example, or another
            vocabulary.
    """

    masks_targets = True
    evaluated_bytes = None

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer | None = None,
        *,
        seq_len: int | None = None,
        batch_size: int = 64,
        examples: int | None = None,
        eval_examples: int = 512,
        train_prompt: bool = False,
        document_mask: bool = False,
        **options: Any,
    ) -> None:
        least_length = task.longest - 1
        length = least_length if seq_len is None else seq_len
        super().__init__(seq_len=length, batch_size=batch_size, **options)
        if examples is not None:
            require_whole("data.examples (null for fresh ones)", examples, least=1)
        require_whole("data.eval_examples", eval_examples, least=1)
        if document_mask:
            raise UserError(
                f"data.document_mask=true has no meaning for data={task.name}, whose examples "
                "never see each other: leave it out."
            )
        if self.seq_len < least_length:
            raise UserError(
                f"data.seq_len={seq_len} is too short for data={task.name}, whose examples have "
                f"up to {task.longest} tokens: set it to {least_length} or more, or to null."
            )
        for index in (0, first_training_index(0)):
            task.example(index)  # raises if training and validation cannot share the questions
        symbols = SymbolTokenizer(task.symbols)
        if tokenizer is not None and not _same_symbols(tokenizer, symbols):
            remedy = "take a model that was trained on this task"
            if tokenizer.kind == symbols.kind:
                remedy = "give the task the options that the model was trained with"
            raise UserError(
                f"data={task.name} with its {symbols.vocab_size} symbols cannot be read by a model "
                f"that has {tokenizer.vocab_size} ids of the kind {tokenizer.kind}: {remedy}."
            )
        self.task = task
        self.examples = examples
        self.eval_examples = eval_examples
        self.train_prompt = train_prompt
        self._tokenizer = symbols

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def scores_answers(self) -> bool:
        return not self.train_prompt

    @property
    def training(self) -> TaskWindows:
        return TaskWindows(
            self.task,
            **self.sizes,
            # A fixed set is the same for every seed, as a corpus is.
            first=first_training_index(self.seed if self.examples is None else 0),
            examples=self.examples,
            train_prompt=self.train_prompt,
        )

    @cached_property
    def evaluation(self) -> TaskWindows:
        return TaskWindows(self.task, **self.sizes, first=0, examples=self.eval_examples)

    @cached_property
    def answer_sets(self) -> dict[str, AnswerSet]:
        tasks = {"": self.task, **self.task.variants()}
        for name, task in tasks.items():
            assert task.symbols == self.task.symbols, name
        return {
            name: AnswerSet(
                task,
                self.eval_examples,
                depth=self.depth,
                stride=self.stride,
                trained=None if name else self.training,
            )
            for name, task in tasks.items()
        }

    @property
    def answer_length(self) -> int:
        """Tokens of the longest answer, up to the first given token."""
        if self.task.ends:
            return self.task.longest_answer
        return max(self._answered_in_a_row(example) for example in self.answer_sets[""].examples)

    def held_out_prompts(self, n: int, length: int = 0, *, fewer: bool = False) -> list[Tensor]:
        """Validation prompts whose answers have the full length, each with the given tokens before
        its answer. ``length`` is ignored: a question has its own length."""
        answer_length = self.answer_length
        prompts = [
            torch.tensor(example.prompt + example.answer[: example.asked.index(True)])
            for example in self.answer_sets[""].examples
            if self.task.ends or self._answered_in_a_row(example) == answer_length
        ]
        if fewer and prompts:
            n = min(n, len(prompts))
        if not 1 <= n <= len(prompts):
            raise UserError(
                f"{n} prompts were asked for but only {len(prompts)} of "
                f"data.eval_examples={self.eval_examples} have an answer of {answer_length} "
                "tokens: ask for fewer, or raise data.eval_examples."
            )
        return prompts[:n]

    @staticmethod
    def _answered_in_a_row(example: Example) -> int:
        """Number of tokens that the model answers without a given token in between."""
        asked = example.asked[example.asked.index(True) :]
        return asked.index(False) if False in asked else len(asked)

    def evaluation_summary(self) -> dict[str, Any]:
        """``fingerprint`` of the validation set, its ``examples`` and its asked ``tokens``."""
        return {
            "fingerprint": digest(self.task.fingerprint(), self.eval_examples),
            "examples": self.eval_examples,
            "tokens": sum(sum(example.asked) for example in self.answer_sets[""].examples),
        }

    def summary(self) -> dict[str, Any]:
        return {
            "task": self.task.spec(),
            "tokenizer": {"kind": self._tokenizer.kind, "vocab_size": self._tokenizer.vocab_size},
            "fingerprint": digest(self.task.fingerprint(), self.examples, self.train_prompt),
            "chance": self.task.chance,
            "longest": self.task.longest,
            "examples_a_window": self.evaluation.per_window,
            "train": {"examples": self.examples},
            "val": {"examples": self.eval_examples},
        }


def _same_symbols(tokenizer: Tokenizer, symbols: SymbolTokenizer) -> bool:
    """Whether a run's ids are the task's; a Hugging Face folder has a tokenizer of another kind."""
    if tokenizer.kind == symbols.kind or tokenizer.vocab_size != symbols.vocab_size:
        return tokenizer.state() == symbols.state()
    ids = tokenizer.encode(" ".join(symbols.symbols))
    return ids.tolist() == list(range(symbols.vocab_size))

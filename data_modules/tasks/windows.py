"""Windows that hold whole examples.

Each window holds as many examples as would fit if all were the longest, so the examples of a window
are a pure function of its number. The rest is padding.

Shapes: B batch, T positions, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch

from data_modules.order import FeistelOrder
from data_modules.tasks.base import END, STREAM, Example, Task
from data_modules.window_dataset import Windows
from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError

EPOCH = 1 << 20
"""Windows of an epoch with fresh examples: an arbitrary number."""


def first_training_index(seed: int) -> int:
    """Index of the first example that a run of this seed reads."""
    return (seed + 1) * STREAM


@dataclass(eq=False)
class TaskWindows(Windows):
    """Windows of whole examples.

    Window i holds examples ``first + i * n`` to ``first + (i + 1) * n - 1``, n = ``per_window``.
    Targets are the asked tokens of the answers, at every depth. If n > 1, document ids keep
    attention and targets inside each example.
    """

    task: Task  # T is at least the length of its longest example minus one
    _: KW_ONLY
    first: int
    examples: int | None  # number of examples; None for no end, in epochs of ``EPOCH`` windows
    train_prompt: bool = False  # whether all of an example's tokens are targets

    def __post_init__(self) -> None:
        self.per_window = (self.seq_len + 1) // self.task.longest
        assert self.per_window >= 1 and 0 <= self.stride * self.depth <= self.seq_len

    def __len__(self) -> int:
        return EPOCH if self.examples is None else -(-self.examples // self.per_window)

    def require(self, batch_size: int, world: int) -> None:
        n, needed = len(self), batch_size * world
        if n < needed:
            raise UserError(
                f"data.examples={self.examples} fill {n} windows but one step takes {needed} "
                f"({batch_size} windows x {world} processes): raise data.examples, or lower "
                "data.batch_size or trainer.accumulate_grad_batches."
            )

    def order(self, seed: int, epoch: int) -> np.ndarray | FeistelOrder:
        if self.examples is None:  # every epoch has fresh examples
            return epoch * EPOCH + np.arange(EPOCH)
        return super().order(seed, epoch)

    def resume(self, seed: int) -> None:
        if self.examples is None:
            self.first = first_training_index(seed)

    def read(self, start: int, n: int) -> list[Example]:
        """n examples, from the one numbered ``start`` on; fewer if there are no more."""
        end = start + n if self.examples is None else min(start + n, self.examples)
        return [self.task.example(self.first + i) for i in range(start, end)]

    def __getitem__(self, numbers: np.ndarray) -> WindowBatch:
        n = self.per_window
        rows = [self.read(number * n, n) for number in numbers.tolist()]
        tokens, scored, numbering = lay_out(rows, self.width, train_prompt=self.train_prompt)
        documents = torch.from_numpy(numbering) if n > 1 else None
        return self.batch(tokens, scored=torch.from_numpy(scored), documents=documents)


def lay_out(
    rows: Sequence[Sequence[Example]], width: int, *, train_prompt: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lays out the examples of every window side by side: their tokens, int64; which of them may be
    targets (with ``train_prompt`` all), bool; and the number of each token's example in its row,
    int64, where the padding is the last one. All three are [B, W]."""
    tokens = np.full((len(rows), width), END, dtype=np.int64)
    scored = np.zeros((len(rows), width), dtype=np.bool_)
    documents = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        end = 0
        for i, example in enumerate(row):
            start, answer, end = end, end + len(example.prompt), end + len(example)
            tokens[number, start:end] = example.prompt + example.answer
            scored[number, start:answer] = train_prompt
            scored[number, answer:end] = train_prompt or example.asked
            documents[number, start:end] = i
        documents[number, end:] = len(row)
    return tokens, scored, documents

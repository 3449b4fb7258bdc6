"""Examples that must never change: the validation sets of earlier runs are made of them."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from data_modules.tasks import HMM, Countdown, Group, Induction, Polynomial, Sat, Sibling, Task
from data_modules.tasks.base import Draws


def checksum(task: Task) -> int:
    """Of the first 200 examples, as people read them."""
    examples = (task.example(i) for i in range(200))
    return crc32("\n".join(task.show([*e.prompt, *e.answer]) for e in examples).encode())


def test_draws_are_the_stream_of_numpys_generator() -> None:
    """However they are asked for, and whatever another example draws in between."""
    sizes = np.random.default_rng(0)
    key = np.random.SeedSequence(3).generate_state(2, np.uint64)
    indices = [0, 1, (1 << 48) + 5, (1 << 64) - 1, 1 << 64, (1 << 127) + 9]
    draws = [Draws(key, index) for index in indices]
    found: list[list[int]] = [[] for _ in indices]
    for _ in range(40):
        for one, numbers in zip(draws, found, strict=True):
            numbers += one.raw(int(sizes.integers(0, 50))).tolist()
    for index, numbers in zip(indices, found, strict=True):
        plain = np.random.Philox(key=key, counter=index << 128)
        assert numbers == plain.random_raw(len(numbers)).tolist()


def test_the_examples_never_change() -> None:
    assert {task: checksum(task) for task in CHECKSUMS} == CHECKSUMS


CHECKSUMS: dict[Task, int] = {
    Countdown(): 1365335878,
    Group(): 3319698788,
    HMM(): 2588983923,
    HMM(process="rrxor"): 312876728,
    Induction(): 1411609835,
    Polynomial(): 3283937684,
    Sat(): 771070767,
    Sibling(): 2533413575,
}

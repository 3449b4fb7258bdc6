"""The loaders. In training an order that is a pure function of (seed, epoch, consumed samples)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from data_modules.order import Order, window_order
from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.system import end_with


class Windows(Protocol):
    """Maps an array of window numbers to a batch of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: np.ndarray, /) -> WindowBatch: ...


class TrainingWindows(Windows, Protocol):
    """Windows that can say why there are too few of them."""

    def require(self, batch_size: int, world: int) -> None:
        """Raises ``UserError`` with the remedy if they are too few for one step.

        Args:
            batch_size: windows of one step of a process.
            world: processes.
        """


class WindowLoader:
    """Training batches of windows for this rank.

    Global batch g of an epoch is ``order[g*G : (g+1)*G]`` with ``G = batch_size * world_size``, and
    rank r takes its r-th contiguous slice: two ranks of B see together what one rank of 2B sees,
    and nothing depends on the number of workers. The windows after the last full global batch are
    left out of that epoch. Each pass of ``iter`` is one epoch; the next one goes on with the next
    epoch.

    ``state_dict`` is exact at any moment: a batch counts as consumed when it is handed to the
    caller, never when a worker has fetched it ahead. ``load_state_dict`` makes the next ``iter``
    start with the batch that would have come next, also after the last batch of an epoch. Lightning
    stores both with its checkpoints. One iterator at a time: a new one takes over from the old.

    Args:
        dataset: the windows.
        batch_size: windows of one whole optimizer step of a rank.
        seed: of the order.
        num_workers: processes that fetch ahead; 0 fetches in this process.
        pin_memory: put batches into page-locked memory.

    Raises:
        UserError: for a ``batch_size`` below 1 or a negative seed.
    """

    def __init__(
        self,
        dataset: TrainingWindows,
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        _check(batch_size, num_workers)
        if seed < 0:
            raise UserError(f"seed must be 0 or more, got {seed}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.epoch = 0
        self.consumed = 0

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch, however much of it is consumed.

        Raises:
            UserError: see :meth:`check`.
        """
        self.check()
        return len(self.dataset) // (self.batch_size * _world()[1])

    def check(self) -> None:
        """Raises ``UserError``, with the remedy, if there are too few windows for one batch."""
        self.dataset.require(self.batch_size, _world()[1])

    def __iter__(self) -> Iterator[WindowBatch]:
        # A generator: Lightning makes iterators that it may never use, and nothing must move then.
        self.check()
        return self._epoch()

    def state_dict(self) -> dict[str, int]:
        """Plain ints: seed, epoch, samples of that epoch consumed by all ranks, and windows."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "windows": len(self.dataset),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken, with the seed it was taken with.

        Raises:
            UserError: if this data has another number of windows, so another order.
        """
        if state["windows"] != len(self.dataset):
            raise UserError(
                f"the checkpoint was saved on {state['windows']} training windows but this data "
                f"has {len(self.dataset)}: resume with the same data, tokenizer and data.seq_len"
            )
        self.seed = int(state["seed"])
        self.epoch = int(state["epoch"])
        self.consumed = int(state["consumed"])

    def order(self, epoch: int) -> Order:
        """Window numbers in the order of an epoch."""
        return window_order(len(self.dataset), seed=self.seed, epoch=epoch)

    def _epoch(self) -> Iterator[WindowBatch]:
        rank, world = _world()
        n, G = len(self.dataset), self.batch_size * world
        if self.consumed + G > n:
            self.epoch, self.consumed = self.epoch + 1, 0
        order = self.order(self.epoch)
        offset = rank * self.batch_size
        batches = (
            order[start + offset : start + offset + self.batch_size]
            for start in range(self.consumed, n - G + 1, G)
        )
        epoch, consumed = self.epoch, self.consumed
        for batch in _fetch(self.dataset, batches, self.num_workers, self.pin_memory):
            consumed += G
            self.epoch, self.consumed = epoch, consumed
            yield batch


class EvaluationLoader:
    """Batches of the evaluation text's windows for this rank, once over all of them.

    Batches hold ``batch_size`` windows in order, the last one what is left, however many ranks
    there are, and rank r takes every ``world_size``-th: each window's loss is then the same to the
    last bit. All ranks have equally many batches; a rank that has none left gets padding.

    Args:
        dataset: the windows.
        batch_size: windows a batch.
        num_workers: processes that fetch ahead; 0 fetches in this process.
        pin_memory: put batches into page-locked memory.

    Raises:
        UserError: for a ``batch_size`` below 1.
    """

    def __init__(
        self,
        dataset: Windows,
        *,
        batch_size: int,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        _check(batch_size, num_workers)
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory

    def __len__(self) -> int:
        """Batches of this rank.

        Raises:
            UserError: see :meth:`check`.
        """
        self.check()
        return -(-len(self.dataset) // (self.batch_size * _world()[1]))

    def check(self) -> None:
        """Raises ``UserError``, with the remedy, if there is no text."""
        if len(self.dataset) == 0:
            raise UserError(
                "the validation split has no document: give more text, or hold out more of it "
                "(data.val_fraction; of token files data.held_out)"
            )

    def __iter__(self) -> Iterator[WindowBatch]:
        n, (rank, world) = len(self.dataset), _world()
        starts = (rank + np.arange(len(self)) * world) * self.batch_size
        ends = np.minimum(starts + self.batch_size, n)
        batches = [np.arange(a, max(a + 1, b)) for a, b in zip(starts, ends, strict=True)]
        return _fetch(self.dataset, batches, self.num_workers, self.pin_memory)


def _check(batch_size: int, num_workers: int) -> None:
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}")
    if num_workers < 0:
        raise UserError(f"data.num_workers must be 0 or more, got {num_workers}")


def _fetch(
    dataset: Windows, batches: Iterable[np.ndarray], num_workers: int, pin_memory: bool
) -> Iterator[WindowBatch]:
    # The base class draws a seed for its workers: from a generator of our own, since the global
    # one must not move (a resumed run would draw once more than an uninterrupted one).
    loader: DataLoader[WindowBatch] = DataLoader(
        dataset,  # type: ignore[arg-type]  # it only maps numbers to batches
        batch_size=None,
        sampler=batches,  # type: ignore[arg-type]  # it is gone through once
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=partial(_serve, os.getpid()),
    )
    yield from loader


def _serve(parent: int, _: int) -> None:
    """Have a process that fetches end by its parent's word or end alone.

    One that is killed leaves others waiting for its words, who print tracebacks. A signal to all
    processes of a run, which is to save and end, must not end these first: torch calls that a
    failure, and nothing is saved.
    """
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(parent,), daemon=True).start()


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _as_is(batch: Any) -> Any:
    return batch


def _world() -> tuple[int, int]:
    """(rank, world size) of ``torch.distributed``, looked up when asked: it starts late."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1

"""The loaders. The training order is a pure function of (seed, epoch, consumed samples)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from data_modules.window_dataset import Windows
from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.system import end_with


@dataclass(eq=False)
class _Loader:
    """Batches of windows for one rank."""

    dataset: Windows
    _: KW_ONLY
    batch_size: int  # windows of a batch, which in training is an optimizer step
    num_workers: int = 0  # processes that prefetch batches; 0 loads them in this process
    pin_memory: bool = False  # whether batches are put into page-locked memory

    def _fetch(self, batches: Iterable[np.ndarray]) -> Iterator[WindowBatch]:
        # DataLoader draws a seed for its workers. A generator of our own keeps the global one from
        # advancing: a resumed run would draw one time more than an uninterrupted one.
        loader: DataLoader[WindowBatch] = DataLoader(
            self.dataset,  # type: ignore[arg-type]  # maps numbers to batches
            batch_size=None,
            sampler=batches,  # type: ignore[arg-type]  # iterated once
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),
            worker_init_fn=partial(_init_worker, os.getpid()),
        )
        try:
            yield from loader
        except UserError as error:  # of a worker, whose traceback torch puts before the sentence
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


@dataclass(eq=False, kw_only=True)
class WindowLoader(_Loader):
    """Training batches of windows for one rank.

    Global batch g of an epoch is ``order[g*G : (g+1)*G]`` with ``G = batch_size * world_size``, and
    rank r takes its r-th contiguous slice: two ranks of B together see what one rank of 2B sees,
    and nothing depends on the number of workers. The windows after the last full global batch are
    left out of that epoch. An ``iter`` yields the rest of the epoch; after its last batch, the next
    ``iter`` is the next epoch.

    ``state_dict``, which Lightning stores with its checkpoints, is exact at any moment: a batch
    counts as consumed when the caller receives it, not when a worker has prefetched it. After
    ``load_state_dict`` the next ``iter`` starts with the batch that would have come next. Advance
    the newest iterator alone: each sets the state to its own position.
    """

    seed: int = 0
    epoch: int = field(default=0, init=False)
    consumed: int = field(default=0, init=False)  # windows of the epoch, by all ranks

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch, consumed or not."""
        self.check()
        return len(self.dataset) // (self.batch_size * _world()[1])

    def check(self) -> None:
        """Raises ``UserError``, with the remedy, if there are too few windows for one batch."""
        self.dataset.require(self.batch_size, _world()[1])

    def __iter__(self) -> Iterator[WindowBatch]:
        # Checked at once. The rest is a generator, which changes the state only when it is
        # advanced: Lightning makes iterators that it may never use.
        self.check()
        return self._epoch()

    def state_dict(self) -> dict[str, int]:
        """Plain ints: seed, epoch, samples of that epoch that all ranks consumed, windows, and
        their length."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "windows": len(self.dataset),
            "seq_len": self.dataset.seq_len,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken, with the same seed.

        Raises:
            UserError: if this data has other windows, by their number or length.
        """
        n, length = len(self.dataset), self.dataset.seq_len
        saved_n, saved_length = state["windows"], state.get("seq_len", length)  # older: no length
        if (saved_n, saved_length) != (n, length):
            raise UserError(
                f"the checkpoint was saved on {saved_n} training windows of {saved_length} tokens "
                f"but this data has {n} of {length}: resume with the same data, tokenizer, "
                "data.seq_len and data.train_windows"
            )
        self.seed = int(state["seed"])
        self.epoch = int(state["epoch"])
        self.consumed = int(state["consumed"])
        self.dataset.resume(self.seed)

    def _epoch(self) -> Iterator[WindowBatch]:
        rank, world = _world()
        n, G = len(self.dataset), self.batch_size * world
        if self.consumed + G > n:
            self.epoch, self.consumed = self.epoch + 1, 0
        order = self.dataset.order(self.seed, self.epoch)
        offset = rank * self.batch_size
        batches = (
            order[start + offset : start + offset + self.batch_size]
            for start in range(self.consumed, n - G + 1, G)
        )
        epoch, consumed = self.epoch, self.consumed
        for batch in self._fetch(batches):
            consumed += G
            self.epoch, self.consumed = epoch, consumed
            yield batch


class EvaluationLoader(_Loader):
    """Batches of the evaluation text's windows for one rank, once over all of them.

    For any number of ranks, batches hold ``batch_size`` windows in order and the last one the rest,
    so each window's loss is the same to the last bit. Rank r takes every ``world_size``-th batch,
    and a rank that runs out gets padding.
    """

    def __len__(self) -> int:
        """Batches of this rank."""
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
        # A batch beyond the end has one window number there, which the dataset reads as padding.
        batches = [np.arange(a, max(a + 1, b)) for a, b in zip(starts, ends, strict=True)]
        return self._fetch(batches)


def _init_worker(parent: int, _: int) -> None:
    """Makes a loader worker end when its parent tells it to, or when its parent ends.

    If a worker is killed first, the processes that wait for it print tracebacks. A signal that goes
    to all processes of a run, for it to save and end, must not end the workers: torch reports their
    end as a failure, and nothing is saved.
    """
    end_with(parent)
    sys.excepthook = _print_unless_killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of, args=(parent,), daemon=True).start()


def _exit_on_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _print_unless_killed(kind: type, error: BaseException, trace: Any) -> None:
    """A ``sys.excepthook`` that waits before it prints a broken pipe. The pipes of a killed parent
    close shortly before its workers are killed, too, which then print nothing."""
    if isinstance(error, BrokenPipeError | ConnectionResetError | EOFError):
        time.sleep(1.0)
    sys.__excepthook__(kind, error, trace)


def _world() -> tuple[int, int]:
    """(rank, world size) of ``torch.distributed``, read at each call because it starts late."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1

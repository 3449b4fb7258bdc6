"""The loader: an order that is a pure function of (seed, epoch, consumed samples), resumable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from data_modules.window_dataset import WindowDataset
from data_modules.windows import WindowBatch


def epoch_order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """``[n]`` permutation of the windows for one epoch.

    It sorts raw Philox numbers, whose stream numpy promises never to change (it makes no such
    promise for ``Generator.permutation``).
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable")


class WindowLoader:
    """Batches of windows for this rank.

    **Training** (``train=True``). Global batch g of an epoch is ``order[g*G : (g+1)*G]`` with
    ``G = batch_size * world_size``, and rank r takes its r-th contiguous slice: two ranks of
    B see together what one rank of 2B sees, and nothing depends on the number of workers. The
    windows after the last full global batch are left out of that epoch. Each pass of ``iter``
    is one epoch; the next one goes on with the next epoch.

    ``state_dict`` is exact at any moment: a batch counts as consumed when it is handed to the
    caller, never when a worker has fetched it ahead. ``load_state_dict`` makes the next ``iter``
    start with the batch that would have come next, also after the last batch of an epoch. Lightning
    stores both with its checkpoints. One iterator at a time: a new one takes over from the old.

    **Evaluation** (``train=False``). Every pass goes once over all windows in the file's order,
    without overlap between ranks; the last batches may be smaller. All ranks have equally many.

    Args:
        dataset: the windows.
        batch_size: windows a batch and rank; for training, those of one whole optimizer step.
        train: see above.
        seed: of the order.
        num_workers: processes that fetch ahead; 0 fetches in this process.
        pin_memory: put batches into page-locked memory.
        name: of the split, for messages.

    Raises:
        ValueError: for a ``batch_size`` below 1 or a negative seed.
    """

    def __init__(
        self,
        dataset: WindowDataset,
        *,
        batch_size: int,
        train: bool,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        name: str = "",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}")
        if seed < 0 or num_workers < 0:
            raise ValueError(
                f"seed and data.num_workers must be 0 or more, got {seed} and {num_workers}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.name = name or ("train" if train else "val")
        self.epoch = 0
        self.consumed = 0

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch, however much of it is consumed.

        Raises:
            ValueError: see :meth:`check`.
        """
        self.check()
        n, G = len(self.dataset), self.batch_size * _world()[1]
        return n // G if self.train else len(self._evaluation_batches())

    def check(self) -> None:
        """Raises ``ValueError``, with the remedy, if there are too few windows for one batch."""
        n, world = len(self.dataset), _world()[1]
        length = self.dataset.length
        if n == 0:
            raise ValueError(
                f"the {self.name} split has {self.dataset.file.n_tokens} tokens but one window "
                f"needs at least seq_len + depth + 1 = {length}: give more text, lower "
                f"data.seq_len, or change data.val_fraction"
            )
        needed = self.batch_size * world if self.train else world
        if n < needed:
            raise ValueError(
                f"the {self.name} split has {n} windows but one step needs {needed} "
                f"({self.batch_size if self.train else 1} windows x {world} processes; a training "
                f"step takes data.batch_size x trainer.accumulate_grad_batches of them): give "
                f"more text, or lower data.batch_size, trainer.accumulate_grad_batches or "
                f"data.seq_len"
            )

    def __iter__(self) -> Iterator[WindowBatch]:
        # A generator: Lightning makes iterators that it may never use, and nothing must move then.
        self.check()
        return self._training_epoch() if self.train else self._fetch(self._evaluation_batches())

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
            ValueError: if this data has another number of windows, so another order.
        """
        if state["windows"] != len(self.dataset):
            raise ValueError(
                f"the checkpoint was saved on {state['windows']} training windows but this data "
                f"has {len(self.dataset)}: resume with the same data, tokenizer and data.seq_len"
            )
        self.seed = int(state["seed"])
        self.epoch = int(state["epoch"])
        self.consumed = int(state["consumed"])

    def _training_epoch(self) -> Iterator[WindowBatch]:
        rank, world = _world()
        n, G = len(self.dataset), self.batch_size * world
        if self.consumed + G > n:
            self.epoch, self.consumed = self.epoch + 1, 0
        order = epoch_order(n, seed=self.seed, epoch=self.epoch)
        offset = rank * self.batch_size
        batches = [
            order[start + offset : start + offset + self.batch_size]
            for start in range(self.consumed, n - G + 1, G)
        ]
        epoch, consumed = self.epoch, self.consumed
        for batch in self._fetch(batches):
            consumed += G
            self.epoch, self.consumed = epoch, consumed
            yield batch

    def _evaluation_batches(self) -> list[np.ndarray]:
        """This rank's batches of window numbers; equally many, and at least one window, each."""
        rank, world = _world()
        n, G = len(self.dataset), self.batch_size * world
        full, rest = divmod(n, G)
        chunks = list(np.arange(full * G).reshape(-1, self.batch_size))
        if rest:
            tail, pieces = np.arange(full * G, n), 1
            if rest < world:
                # Too few for every rank: spread the last full global batch out as well.
                del chunks[-world:]
                tail, pieces = np.arange(full * G - G, n), min(2, self.batch_size)
            chunks += np.array_split(tail, pieces * world)
        return chunks[rank::world]

    def _fetch(self, batches: list[np.ndarray]) -> Iterator[WindowBatch]:
        # The base class draws a seed for its workers: from a generator of our own, since the
        # global one must not move (a resumed run would draw once more than an uninterrupted one).
        loader: DataLoader[WindowBatch] = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),
        )
        yield from loader


def _as_is(batch: Any) -> Any:
    return batch


def _world() -> tuple[int, int]:
    """(rank, world size) of ``torch.distributed``, looked up when asked: it starts late."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1

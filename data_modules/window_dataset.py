"""Windows that a dataset cuts, and those of a token file: each batch is one vectorized gather."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data_modules.order import FeistelOrder, window_order
from data_modules.shards import ShardedTokens, windows_at
from data_modules.token_store import TokenFile
from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError

STATES = "states.npy"
"""File of a frozen trunk's states of all windows, ``[windows, S, T, C]``; bf16 stored as uint16."""

# Seed of the order in which ``limit`` chooses windows; so large that no run's seed equals it.
_LIMITED = 2**31 - 1


def window_count(n_tokens: int, seq_len: int, beyond: int) -> int:
    """Number of windows of T + 1 + ``beyond`` tokens that start T tokens apart.

    It depends on ``beyond`` only in a text with room for one window at most: models of different D
    see the same windows in the same order, and every token after the first is a depth-0 target at
    most once.
    """
    n = (n_tokens - 1 - seq_len) // seq_len
    if n > 0:
        return n
    return 1 if n_tokens >= seq_len + beyond + 1 else 0


@dataclass(eq=False, kw_only=True)
class Windows(Dataset[WindowBatch], ABC):
    """Maps an array of window numbers to a :class:`WindowBatch` of T + s D + 1 + E tokens."""

    seq_len: int  # T
    depth: int  # D
    stride: int = 1  # s, tokens from one depth's target to the next one's
    extra: int = 0  # E, tokens of a window after its T + s D + 1

    @property
    def beyond(self) -> int:
        """s D + E, by which a window is longer than T + 1."""
        return self.stride * self.depth + self.extra

    @property
    def width(self) -> int:
        """Tokens of a window."""
        return self.seq_len + 1 + self.beyond

    @abstractmethod
    def __len__(self) -> int:
        """Number of windows."""

    @abstractmethod
    def __getitem__(self, numbers: np.ndarray) -> WindowBatch:
        """The windows of these numbers."""

    def require(self, batch_size: int, world: int) -> None:
        """Raises ``UserError``, with the remedy, if there are too few training windows for one step
        of ``world`` processes with ``batch_size`` windows each."""

    def order(self, seed: int, epoch: int) -> np.ndarray | FeistelOrder:
        """Window numbers in the order of an epoch of training."""
        return window_order(len(self), seed=seed, epoch=epoch)

    def resume(self, seed: int) -> None:
        """Continues with the windows of a stored run's seed, if they depend on it."""

    def batch(self, tokens: np.ndarray, **fields: Any) -> WindowBatch:
        """The batch of some windows, from their ids ``[B, width]`` of any integer type and other
        fields of :class:`WindowBatch`."""
        ids = torch.from_numpy(tokens.astype(np.int64))
        return WindowBatch(ids, self.depth, stride=self.stride, extra=self.extra, **fields)

    def __getstate__(self) -> dict[str, object]:
        """Leaves cached values out: each loader worker opens the files itself."""
        cls = type(self)
        return {
            name: value
            for name, value in self.__dict__.items()
            if not isinstance(getattr(cls, name, None), cached_property)
        }


@dataclass(eq=False)
class WindowDataset(Windows):
    """Windows of a token file; window i begins at token ``i * T``.

    Raises:
        UserError: the file has fewer windows than ``limit``.
    """

    file: TokenFile
    _: KW_ONLY
    document_mask: bool = False  # whether batches carry document ids
    # Folder with a frozen trunk's states of these windows, which batches then carry.
    states: Path | None = None
    # Number of windows to keep, chosen by an order that depends only on the number of windows in
    # the file; None for all.
    limit: int | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.stride * self.depth <= self.beyond <= self.seq_len
        self._chosen: np.ndarray | None = None
        if self.limit is not None:
            n_windows = self._in_file
            if self.limit > n_windows:
                raise UserError(
                    f"data.train_windows={self.limit} is more than the {n_windows} windows of the "
                    "training split: give a smaller number, or all."
                )
            self._chosen = window_order(n_windows, seed=_LIMITED, epoch=0)[: self.limit]

    def __len__(self) -> int:
        return self._in_file if self._chosen is None else len(self._chosen)

    @property
    def _in_file(self) -> int:
        return window_count(self.file.n_tokens, self.seq_len, self.beyond)

    def require(self, batch_size: int, world: int) -> None:
        n, needed = len(self), batch_size * world
        if n == 0:
            raise UserError(
                f"the training split has {self.file.n_tokens} tokens but one window needs at "
                f"least {self.width} (data.seq_len + 1, and {self.beyond} for the depths): give "
                "more text, lower data.seq_len, or change data.val_fraction (of token files "
                "data.held_out)."
            )
        if n < needed:
            supply, more = f"the training split has {n} windows", "give more text"
            if self.limit is not None:
                supply, more = f"data.train_windows={n} is set", "keep more windows"
            raise UserError(
                f"{supply} but one step needs {needed} "
                f"({batch_size} windows x {world} processes; a step takes data.batch_size x "
                f"trainer.accumulate_grad_batches of them): {more}, or lower "
                f"data.batch_size, trainer.accumulate_grad_batches or data.seq_len."
            )

    def __getitem__(self, numbers: np.ndarray) -> WindowBatch:
        states = None if self.states is None else self._states(numbers)
        if self._chosen is not None:
            numbers = self._chosen[numbers]
        tokens = windows_at(self._tokens, numbers * self.seq_len, self.width)
        documents = torch.from_numpy(self._documents(numbers)) if self.document_mask else None
        return self.batch(tokens, documents=documents, states=states)

    @cached_property
    def _tokens(self) -> np.ndarray | ShardedTokens:
        return self.file.tokens()

    @cached_property
    def _starts(self) -> np.ndarray:
        return self.file.starts()

    @cached_property
    def _stored_states(self) -> np.ndarray:
        assert self.states is not None
        return np.load(self.states / STATES, mmap_mode="r")  # type: ignore[no-any-return]

    def _states(self, numbers: np.ndarray) -> torch.Tensor:
        states = torch.from_numpy(self._stored_states[numbers])
        return states.view(torch.bfloat16) if states.dtype == torch.uint16 else states

    def _documents(self, numbers: np.ndarray) -> np.ndarray:
        """``[B, T+D+1]`` int64 number of the document that each token belongs to."""
        index_BW = numbers[:, None] * self.seq_len + np.arange(self.width)
        return self._starts.searchsorted(index_BW, side="right") - 1

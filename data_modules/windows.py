"""The one thing that the data and the model share: windows of T + D + 1 tokens.

A window ``w`` serves every prediction depth (DeepSeek-V3, arXiv 2412.19437, fig. 3): depth k reads
``w[k : T+k]`` and predicts ``w[k+1 : T+k+1]``. All of them are views of one tensor, and all have
the full width T: no depth loses targets at the window's end.

Shape letters: B batch, T positions, D prediction depths beyond the next token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Value of a target that does not count, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """A batch of windows, with the shifted targets of every depth.

    Args:
        tokens: ``[B, T+D+1]`` int64 token ids.
        depth: D that the windows were cut for.
        documents: ``[B, T+D+1]`` int64 ids of the document that each token belongs to (original
            ids: unique and contiguous, a document's end-of-text token belongs to it), or ``None``
            for no document mask.

    Raises:
        ValueError: if the shapes or D do not fit together.
    """

    tokens: Tensor
    depth: int
    documents: Tensor | None = None

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ValueError(f"depth must be 0 or more, got {self.depth}")
        if self.tokens.ndim != 2 or self.tokens.shape[1] < self.depth + 2:
            raise ValueError(
                f"tokens must be [B, T+D+1] with T >= 1 and D = {self.depth}, "
                f"got {tuple(self.tokens.shape)}"
            )
        if self.documents is not None and self.documents.shape != self.tokens.shape:
            raise ValueError(
                f"documents {tuple(self.documents.shape)} must have the shape of tokens "
                f"{tuple(self.tokens.shape)}"
            )

    def __len__(self) -> int:
        return self.batch_size

    @property
    def batch_size(self) -> int:
        """B, the number of windows."""
        return int(self.tokens.shape[0])

    @property
    def seq_len(self) -> int:
        """T, the positions that every depth is trained on."""
        return int(self.tokens.shape[1]) - self.depth - 1

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def targets(self, k: int) -> Tensor:
        """``[B, T]`` targets of depth k.

        A view of ``tokens`` without a document mask; with one, a copy that is -100 where
        :meth:`valid` is false.
        """
        self._check(k)
        shifted = self.tokens[:, k + 1 : self.seq_len + k + 1]
        valid = self.valid(k)
        return shifted if valid is None else shifted.masked_fill(~valid, IGNORE_INDEX)

    def valid(self, k: int) -> Tensor | None:
        """``[B, T]`` bool: position i counts at depth k; ``None`` without a document mask.

        Tokens i .. i+k+1 lie in one document. Ids are contiguous, so comparing the two ends with
        the total shift is enough; chained one-step comparisons of shifted masks leak at D >= 2.
        """
        self._check(k)
        if self.documents is None:
            return None
        T = self.seq_len
        return self.documents[:, :T] == self.documents[:, k + 1 : T + k + 1]

    def counts(self) -> Tensor:
        """``[D+1]`` int64 number of valid targets of every depth, on the batch's device."""
        if self.documents is None:
            total = self.batch_size * self.seq_len
            return torch.full((self.depth + 1,), total, dtype=torch.int64, device=self.device)
        T = self.seq_len
        first = self.documents[:, :T]
        return torch.stack(
            [(first == self.documents[:, k + 1 : T + k + 1]).sum() for k in range(self.depth + 1)]
        )

    def micro_batches(self, n: int) -> list[WindowBatch]:
        """Splits the batch along B into n batches of views, as even as possible.

        Raises:
            ValueError: if there are fewer windows than n, or n < 1.
        """
        if not 1 <= n <= self.batch_size:
            raise ValueError(
                f"cannot split {self.batch_size} windows into {n} micro-batches: "
                f"the number must be from 1 to {self.batch_size}"
            )
        tokens = self.tokens.tensor_split(n)
        documents = (None,) * n if self.documents is None else self.documents.tensor_split(n)
        return [WindowBatch(t, self.depth, d) for t, d in zip(tokens, documents, strict=True)]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> WindowBatch:
        """The batch on another device (Lightning's transfer hook calls this)."""
        tokens = self.tokens.to(device, non_blocking=non_blocking)
        documents = self.documents
        if documents is not None:
            documents = documents.to(device, non_blocking=non_blocking)
        return WindowBatch(tokens, self.depth, documents)

    def pin_memory(self) -> WindowBatch:
        """The batch in page-locked memory (torch's DataLoader calls this)."""
        documents = None if self.documents is None else self.documents.pin_memory()
        return WindowBatch(self.tokens.pin_memory(), self.depth, documents)

    def require_depth(self, depth: int) -> None:
        """Refuses a batch that was cut for another D than the model's.

        Raises:
            ValueError: naming both depths.
        """
        if self.depth != depth:
            raise ValueError(
                f"the batch was built for depth D = {self.depth} but the model predicts "
                f"D = {depth} depths: give data and model the same mtp.depth"
            )

    def _check(self, k: int) -> None:
        if not 0 <= k <= self.depth:
            raise ValueError(f"depth k = {k} is outside 0..{self.depth} of this batch")

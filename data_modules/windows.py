"""Windows of T + D + 1 tokens: the only thing that the data and the model share.

A window ``w`` serves every prediction depth (DeepSeek-V3, arXiv 2412.19437, fig. 3): depth k reads
``w[k : T+k]`` and predicts ``w[k+1 : T+k+1]``. All of them are views of one tensor, and all have
the full width T: no depth loses targets at the window's end. With a stride s (leap multi-token
prediction, arXiv 2505.17505) depth k predicts ``w[s k + 1 : T + s k + 1]``, of T + s D + 1 tokens.
A head that looks further ahead than its depth gets E more tokens at the window's end.

Shape letters: B batch, T positions, D prediction depths beyond the next token, E extra tokens (0
unless a comment says otherwise).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_whole

IGNORE_INDEX = -100
"""Target value that does not count, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class RandomKey:
    """Everything that a random choice in training depends on, so that no generator is stored.

    Attributes:
        seed: seed of the run.
        step: optimizer step, from 0.
        first_row: index of the batch's first window in the step's global batch. So the choices do
            not depend on accumulation or on the number of ranks.
    """

    seed: int
    step: int
    first_row: int = 0


@dataclass(eq=False)  # not frozen: Lightning sets the fields to convert a batch's precision
class WindowBatch:
    """A batch of windows, with the shifted targets of every depth.

    Args:
        tokens: ``[B, T+D+1]`` int64 token ids.
        depth: D that the windows were cut for.
        documents: ``[B, T+D+1]`` int64 id of the document that each token belongs to. Ids are
            unique and contiguous, and an end-of-text token belongs to the document that it ends.
            ``None``: no document mask.
        scored: ``[B, T+D+1]`` bool: whether a token may be a target, at any depth; ``None`` if all
            may. Tokens that are not scored are still read.
        texts: ``[B, T+D+1]`` int64 number of the evaluated text whose loss a target counts toward;
            ``None`` in training. Unlike ``documents`` it masks nothing.
        stride: s, tokens from one depth's target to the next one's. Where it is not 1, all fields
            are ``[B, T+sD+1]``.
        extra: E more tokens at the end of every window; all fields are E wider.
        states: ``[B, S, T, C]`` output of a frozen trunk for the windows, if it was cached: its
            final state, and with S > 1 also the S - 1 states that the depths start from.
        host: the batch on the CPU that this one was copied from. Masks are counted there, without
            waiting for the device.
        key: key of the model's random choices for these windows; ``None`` outside of training.
    """

    tokens: Tensor
    depth: int
    documents: Tensor | None = None
    scored: Tensor | None = None
    texts: Tensor | None = None
    stride: int = 1
    extra: int = 0
    states: Tensor | None = None
    host: WindowBatch | None = None
    key: RandomKey | None = None

    def __post_init__(self) -> None:
        assert self.depth >= 0 and self.extra >= 0 and self.stride >= 1
        assert self.tokens.ndim == 2 and self.seq_len >= 1, tuple(self.tokens.shape)
        for field in (self.documents, self.scored, self.texts):
            assert field is None or field.shape == self.tokens.shape, tuple(field.shape)

    def __len__(self) -> int:
        """B, the number of windows."""
        return int(self.tokens.shape[0])

    @property
    def seq_len(self) -> int:
        """T, the positions that every depth is trained on."""
        return int(self.tokens.shape[1]) - self.stride * self.depth - 1 - self.extra

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def every_target_counts(self) -> bool:
        """Whether there is no mask; known without reading tensors."""
        return self.documents is None and self.scored is None

    def targets(self, k: int) -> Tensor:
        """``[B, T]`` targets of depth k.

        A view of ``tokens`` without a mask; with one, a copy that is -100 where :meth:`valid` is
        false.
        """
        shifted = self.shifted(self.tokens, k)
        valid = self.valid(k)
        return shifted if valid is None else shifted.masked_fill(~valid, IGNORE_INDEX)

    def valid(self, k: int) -> Tensor | None:
        """``[B, T]`` bool: whether position i counts at depth k; ``None`` if all do.

        It counts if its target, token i+sk+1, is scored and tokens i .. i+sk+1 lie in one document.
        Ids are contiguous, so comparing the two ends with the total shift is enough; chained
        one-step comparisons of shifted masks leak at D >= 2.
        """
        valid = None if self.scored is None else self.shifted(self.scored, k)
        if self.documents is not None:
            same = self.documents[:, : self.seq_len] == self.shifted(self.documents, k)
            valid = same if valid is None else same & valid
        return valid

    def positions_with_teacher(self, k: int) -> int:
        """Number of positions of a window, from its first, that have a teacher at depth k: the main
        prediction of the same token, at i + sk. For the last sk it lies beyond the window."""
        return max(self.seq_len - self.stride * k, 0)

    def shifted(self, field: Tensor, k: int) -> Tensor:
        """``[B, T]`` view of a ``[B, T+sD+1]`` field at the targets of depth k; s k is at most
        s D + E."""
        assert 0 <= self.stride * k <= self.stride * self.depth + self.extra
        start = self.stride * k + 1
        return field[:, start : start + self.seq_len]

    def map(self, function: Callable[[Tensor], Tensor]) -> WindowBatch:
        """The batch with ``function`` applied to every field; it may slice both dimensions.
        ``states`` are left out, since they belong to whole windows."""
        names = ("tokens", "documents", "scored", "texts")
        fields = {name: field for name in names if (field := getattr(self, name)) is not None}
        mapped: dict[str, Any] = {name: function(field) for name, field in fields.items()}
        return replace(self, **mapped, states=None, host=None)

    def micro_batches(self, n: int) -> list[WindowBatch]:
        """Splits the batch along B into n batches of views, as even as possible; n is at most B."""
        require_whole("accumulate", n, least=1, most=len(self))

        def part(i: int) -> WindowBatch:
            return self._map_rows(lambda field: field.tensor_split(n)[i])

        parts = [part(i) for i in range(n)]
        if self.key is None:
            return parts
        firsts = itertools.accumulate(map(len, parts[:-1]), initial=self.key.first_row)
        keys = [replace(self.key, first_row=first) for first in firsts]
        return [replace(batch, key=key) for batch, key in zip(parts, keys, strict=True)]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> WindowBatch:
        """The batch on another device; Lightning's transfer hook calls this."""
        moved = self._map_rows(lambda field: field.to(device, non_blocking=non_blocking))
        copied = self.device.type == "cpu" and moved.device.type != "cpu"
        return replace(moved, host=self) if copied else moved

    def pin_memory(self) -> WindowBatch:
        """The batch in page-locked memory; torch's DataLoader calls this."""
        return self._map_rows(torch.Tensor.pin_memory)

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> WindowBatch:
        """:meth:`map` by a function that keeps windows whole, so that ``states`` stay."""
        mapped = self.map(function)
        return mapped if self.states is None else replace(mapped, states=function(self.states))

    def require_depth(self, depth: int, stride: int = 1) -> None:
        """Refuses a batch that was cut for a D or stride other than the model's.

        Raises:
            UserError: naming both.
        """
        for key, given, own in (("depth", self.depth, depth), ("stride", self.stride, stride)):
            if given != own:
                raise UserError(
                    f"the batch was built for mtp.{key}={given} but the model's is {own}: give "
                    f"data and model the same mtp.{key}"
                )

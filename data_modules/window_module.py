"""The LightningDataModule that text and tasks share: windows for training and validation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from data_modules.loader import EvaluationLoader, WindowLoader
from data_modules.token_store import TokenFile
from data_modules.tokenizers.base import Tokenizer
from data_modules.window_dataset import Windows
from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_whole


@dataclass(eq=False, repr=False, kw_only=True)
class WindowDataModule(LightningDataModule, ABC):
    """Windows of T + D + 1 tokens for training and validation.

    One batch of the training loader is **one optimizer step of this rank**: ``batch_size *
    accumulate`` windows, which the module splits with :meth:`WindowBatch.micro_batches`.

    Args:
        seq_len: T, the positions of a window.
        batch_size: windows of a micro-batch on one rank.
        depth: D, the model's number of depths beyond the next token.
        stride: s, tokens from one depth's target to the next one's.
        accumulate: micro-batches of an optimizer step.
        eval_batch_size: windows of a validation batch on one rank; ``batch_size`` if None.
        num_workers: processes that prefetch batches.
        pin_memory: whether batches are in page-locked memory; if None, when there is a GPU.
        seed: seed of the training windows.
        lookahead: tokens after a position that the model's head looks at, if more than D + 1.
            Windows hold them, up to T + 1 tokens after their last position.

    Raises:
        UserError: for numbers out of range.
    """

    seq_len: int = 256
    batch_size: int = 16
    depth: int = 0
    stride: int = 1
    accumulate: int = 1
    eval_batch_size: int = None  # type: ignore[assignment]  # None is replaced by batch_size
    num_workers: int = 0
    pin_memory: bool | None = None
    seed: int = 0
    lookahead: int = 0
    # Packages whose classes the data may build. The caller sets this; a config, which may come from
    # anyone, never does.
    allow: Collection[str] = field(default=(), init=False)

    def __post_init__(self) -> None:
        super().__init__()
        require_whole("data.seq_len", self.seq_len, least=1)
        require_whole("data.batch_size", self.batch_size, least=1)
        require_whole("trainer.accumulate_grad_batches", self.accumulate, least=1)
        if self.eval_batch_size is None:
            self.eval_batch_size = self.batch_size
        require_whole("data.eval_batch_size", self.eval_batch_size, least=1)
        require_whole("data.num_workers", self.num_workers, least=0)
        require_whole("seed", self.seed, least=0)
        require_whole("mtp.stride", self.stride, least=1)
        require_whole("mtp.lookahead", self.lookahead, least=0)
        require_whole("mtp.depth", self.depth, least=0)
        if self.stride * self.depth > self.seq_len:
            raise UserError(
                f"mtp.depth={self.depth} x mtp.stride={self.stride} reaches beyond "
                f"data.seq_len={self.seq_len}: lower one of the two, or lengthen the window."
            )
        if not self.depth:  # the stride has no meaning, and the model has none
            self.stride = 1

    @property
    def sizes(self) -> dict[str, Any]:
        """T, D, s and E of the windows, as the arguments of :class:`Windows`."""
        reach = min(self.lookahead, self.seq_len + 1)
        extra = max(reach - self.stride * self.depth - 1, 0)
        return {"seq_len": self.seq_len, "depth": self.depth, "stride": self.stride, "extra": extra}

    def resolved_settings(self) -> dict[str, Any]:
        """Values of the group ``data`` that the data determine themselves, by their keys."""
        return {"seq_len": self.seq_len}

    def prepare(self, stage: str = "fit") -> None:
        """Builds or finds the data, and checks that there is enough of it for a validation, and for
        ``fit`` also for a training step. Idempotent.

        Raises:
            UserError: about the text (empty, not UTF-8, shorter than a window ...) or a source's
                package.
            OSError: if a file cannot be read or written.
        """
        if stage == "fit":
            self.train_dataloader().check()
        self.val_dataloader().check()

    def transfer_batch_to_device(
        self, batch: WindowBatch, device: torch.device, dataloader_idx: int
    ) -> WindowBatch:
        """Copies to a GPU while it still works on the previous step; Lightning would wait for
        anything but plain tensors."""
        return batch.to(device, non_blocking=True)

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the ids."""

    @property
    @abstractmethod
    def masks_targets(self) -> bool:
        """Whether a depth may be left without a target in some step."""

    @property
    @abstractmethod
    def evaluation(self) -> Windows:
        """The windows of every validation."""

    @property
    @abstractmethod
    def evaluated_bytes(self) -> list[int] | None:
        """UTF-8 bytes of the predicted part of each document; None where there is no text."""

    @property
    def scores_answers(self) -> bool:
        """Whether the targets of an example are its answer alone."""
        return False

    @property
    def has_text(self) -> bool:
        """Whether ids stand for text, so that bytes can be counted."""
        return self.evaluated_bytes is not None

    @property
    def answer_length(self) -> int | None:
        """Tokens of an answer to one of :meth:`held_out_prompts`; None for text."""
        return None

    @property
    def answer_sets(self) -> dict[str, Any]:
        """Sets of questions to judge at validation, by name; "" is the validation set itself."""
        return {}

    @property
    def training_text(self) -> TokenFile | None:
        """The training text, which counts its ids; None for a task."""
        return None

    @property
    @abstractmethod
    def training(self) -> Windows:
        """The windows of every epoch of training."""

    def train_dataloader(self) -> WindowLoader:
        """Lightning's hook."""
        return WindowLoader(
            self.training,
            batch_size=self.batch_size * self.accumulate,
            seed=self.seed,
            **self._loading,
        )

    def val_dataloader(self) -> EvaluationLoader:
        """Lightning's hook."""
        return EvaluationLoader(self.evaluation, batch_size=self.eval_batch_size, **self._loading)

    @abstractmethod
    def evaluation_summary(self) -> dict[str, Any]:
        """Facts about the validation data; equal values of ``fingerprint`` mean equal data."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Plain facts about the data, for the run's summary and checkpoints."""

    @abstractmethod
    def held_out_prompts(self, n: int, length: int, *, fewer: bool = False) -> list[Tensor]:
        """n prompts from validation data, int64; for text, each of ``length`` tokens. With
        ``fewer``, fewer than n, at least one, are accepted instead of refused."""

    @property
    def _loading(self) -> dict[str, Any]:
        pins = torch.cuda.is_available() if self.pin_memory is None else self.pin_memory
        return {"num_workers": self.num_workers, "pin_memory": pins}

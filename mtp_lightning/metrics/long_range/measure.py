"""All teacher-forced measures of how far back a model looks, over the same batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.long_range.positions import PositionLoss
from mtp_lightning.metrics.long_range.reading import read
from mtp_lightning.metrics.long_range.repeats import NaturalRepeats, random_repeats
from mtp_lightning.metrics.long_range.truncation import TruncatedContext
from mtp_lightning.model import MTPModel


class LongRange:
    """Counts batches of validation windows.

    It costs about two passes over them: one over the whole windows, which positions and repeats
    share, and less than one over shortened windows.

    Args:
        model: a model, in evaluation mode when it is used.
        seq_len: T of the windows.
        token_bytes: bytes of every id of the tokenizer.
    """

    def __init__(self, model: MTPModel, seq_len: int, token_bytes: Sequence[bytes]) -> None:
        device = model.head.weight.device
        self.model, self.seq_len = model, seq_len
        self.positions = PositionLoss(model.token_depth, seq_len).to(device)
        self.truncation = TruncatedContext(seq_len).to(device)
        self.repeats = NaturalRepeats(token_bytes).to(device)

    @torch.no_grad()
    def update(self, batch: WindowBatch) -> None:
        """Counts one batch, on the model's device."""
        reading = read(self.model, batch, depths=self.model.token_depth > 0)
        self.positions.update(reading)
        self.truncation.update(self.model, batch, reading)
        self.repeats.update(batch, reading)

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """The values by name, over all ranks; a value without any count is left out."""
        values = {
            **self.positions.compute(),
            **self.truncation.compute(),
            **self.repeats.compute(),
            **random_repeats(self.model, self.seq_len),
        }
        return {name: value for name, value in values.items() if value == value}

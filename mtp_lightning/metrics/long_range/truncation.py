"""How much the text more than c tokens back helps.

A mask that limits every layer to c tokens back does not truncate, since the inputs of a deep layer
have themselves read c tokens further back. So the model reads only the last c tokens. This is done
for one target per window, its last: all contexts together then cost less than one pass over the
text.

Shapes: B batch, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.long_range.reading import Reading, read
from mtp_lightning.model import MTPModel

NEGLIGIBLE = 0.01
"""Nats below which a gain counts as none."""


def contexts(seq_len: int) -> list[int]:
    """8, 16, .. up to half of ``seq_len``: together shorter than a window."""
    found, c = [], 8
    while 2 * c <= seq_len:
        found.append(c)
        c *= 2
    return found


def last_tokens(batch: WindowBatch, context: int) -> WindowBatch:
    """The same last targets, with only the last ``context`` tokens to read."""
    start = batch.seq_len - context
    return batch.map(lambda field: field[:, start:])


class TruncatedContext(Metric):
    """``context_gain_c``: depth 0's loss of every window's last target if the model reads only the
    last c tokens, minus that with the whole window, in nats; ``context_gain_c_se``, the standard
    error of this paired mean over windows; ``effective_context``, the smallest c from which every
    gain is below 0.01 nats, and T if there is none."""

    full_state_update = False
    count: Tensor
    gain: Tensor
    square: Tensor

    def __init__(self, seq_len: int) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.contexts = contexts(seq_len)
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("gain", "square"):
            zeros = torch.zeros(len(self.contexts), dtype=torch.float64)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")

    def update(self, model: MTPModel, batch: WindowBatch, reading: Reading) -> None:
        """Counts one batch; ``reading`` is that of the whole windows. Windows shorter than the
        given length are left out: their last target has no whole window before it."""
        if batch.seq_len < self.seq_len:
            return
        valid_B = reading.valid_KBT[0, :, -1]
        self.count += valid_B.sum()
        for i, context in enumerate(self.contexts):
            short = read(model, last_tokens(batch, context), depths=False)
            gain_B = (short.losses_KBT[0, :, -1] - reading.losses_KBT[0, :, -1])[valid_B].double()
            self.gain[i] += gain_B.sum()
            self.square[i] += gain_B.square().sum()

    def compute(self) -> dict[str, float]:
        """The values by name; NaN without any count."""
        if not self.contexts:
            return {}
        mean = self.gain / self.count
        spread = (self.square / self.count - mean.square()).clamp(min=0) / (self.count - 1)
        values: dict[str, float] = {}
        for context, gain, se in zip(
            self.contexts, mean.tolist(), spread.sqrt().tolist(), strict=True
        ):
            values[f"context_gain_{context}"] = gain
            values[f"context_gain_{context}_se"] = se
        if self.count:
            values["effective_context"] = effective_context(
                dict(zip(self.contexts, mean.tolist(), strict=True)), self.seq_len
            )
        return values


def effective_context(gains: dict[int, float], seq_len: int) -> float:
    """The smallest context from which every gain is negligible; ``seq_len`` if there is none."""
    enough = seq_len
    for context in sorted(gains, reverse=True):
        if not gains[context] < NEGLIGIBLE:
            break
        enough = context
    return float(enough)

"""Heads that predict a summary of all tokens ahead, with their own output matrix.

Such a head is one matrix on the trunk's final state, trained on its own loss over the tokens ahead
of every position: those ``first`` to ``last`` positions ahead, up to the end of the window and,
with a document mask, of the document. Tokens that may not be targets (the prompts of a task,
padding) do not count. If an id occurs several times, only its nearest occurrence that may be a
target counts.

Shapes: B windows, T positions, W tokens of a window, R positions of one chunk, S tokens ahead.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.config import ModulesConfig
from mtp_lightning.mtp.feed import OwnLoss
from mtp_lightning.mtp.kinds import TrainingOnly, TrainingOnlyConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.linear import Linear


@dataclass(frozen=True, kw_only=True)
class SummaryConfig(TrainingOnlyConfig, ModulesConfig):
    """Switches of a head with its own unembedding.

    With a frozen or detached trunk the head is a probe: its loss measures what the trunk knows of
    the tokens ahead, and nothing else learns from it. There is no ``detach=all``, since the head
    does not use the shared head.
    """

    brings_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detach == "all":
            raise UserError(
                f"mtp.detach=all has no meaning for mtp={self.variant}, which does not use the "
                "shared head: set mtp.detach=trunk."
            )

    def outputs(self, trunk: TrunkConfig) -> int:
        """Rows of the matrix: outputs of the head per position."""
        return trunk.vocab_size


class Summary(TrainingOnly):
    """One matrix on the trunk's final state, [V, C] unless ``config.outputs`` says otherwise."""

    config: SummaryConfig

    def __init__(self, config: SummaryConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        self.head = Linear(trunk.d_model, config.outputs(trunk))

    @abstractmethod
    def own_loss(self, k: int, batch: WindowBatch) -> OwnLoss: ...

    def ahead_of(self, batch: WindowBatch) -> LookAhead:
        """The tokens ahead that the head predicts."""
        return LookAhead(batch, first=self.config.first_ahead, last=self.config.lookahead)


class SummaryLoss(OwnLoss):
    """A loss over the tokens ahead, which trains the matrix of ``head``; a subclass computes it
    together with its gradient."""

    def __init__(self, head: Summary, batch: WindowBatch) -> None:
        self.head, self.ahead = head, head.ahead_of(batch)
        super().__init__(head.head.weight, self.ahead.valid())
        # The tokens ahead of a chunk take as much memory as its logits, or less.
        self.width = self.ahead.last

    def value(self, rows: slice, logits_RV: Tensor) -> Tensor:
        return self.gradient(rows, logits_RV)[0]

    @abstractmethod
    def gradient(self, rows: slice, logits_RV: Tensor) -> tuple[Tensor, Tensor]: ...


class LookAhead:
    """The tokens ahead of every position of some windows: those ``first`` (1 is the next one) to
    ``last`` positions ahead, fewer at the window's end."""

    def __init__(self, batch: WindowBatch, *, first: int, last: int) -> None:
        tokens_BW, documents_BW, seq_len = batch.tokens, batch.documents, batch.seq_len
        width = tokens_BW.shape[1]
        self.seq_len, self.first = seq_len, first
        self.last = min(last, width - 1)
        self.tokens_BW, self.scored_BW = tokens_BW, batch.scored
        places_T = torch.arange(seq_len, device=tokens_BW.device)
        # The farthest token that each position looks at.
        self.stop_BT = (places_T + self.last).clamp(max=width - 1).expand(len(tokens_BW), -1)
        if documents_BW is not None:
            ends_BW = _last_of_document(documents_BW)
            self.stop_BT = torch.minimum(self.stop_BT, ends_BW[:, :seq_len])

    @cached_property
    def before_BW(self) -> Tensor:
        """Index of the nearest earlier token with the same id that may be a target, [B, W]; -1 for
        none, W if the token itself may not be a target. Counting positions does not need it."""
        tokens_BW, scored_BW = self.tokens_BW, self.scored_BW
        key_BW = tokens_BW if scored_BW is None else tokens_BW.masked_fill(~scored_BW, -1)
        sorted_BW, order_BW = key_BW.sort(dim=1, stable=True)
        same_BV = sorted_BW[:, 1:] == sorted_BW[:, :-1]
        before_BW = torch.full_like(order_BW, -1)
        before_BW.scatter_(1, order_BW[:, 1:], order_BW[:, :-1].where(same_BV, -1))
        return before_BW.masked_fill_(key_BW < 0, tokens_BW.shape[1])

    def valid(self) -> Tensor:
        """Which positions have a token ahead that counts: bool [B, T]."""
        start_T = torch.arange(self.seq_len, device=self.stop_BT.device) + self.first
        if self.scored_BW is None:
            return self.stop_BT >= start_T
        n_scored_BW = self.scored_BW.cumsum(1)
        until_start_BT = n_scored_BW[:, start_T - 1]
        return n_scored_BW.gather(1, self.stop_BT) > until_start_BT

    def rows(self, place: slice) -> tuple[Tensor, Tensor]:
        """The tokens ahead of the positions ``place`` among the B x T, the nearest first.

        Returns:
            Token ids [R, S], arbitrary beyond the end, and which of them count and are the nearest
            of their id, bool [R, S].
        """
        width = self.tokens_BW.shape[1]
        index_R1 = torch.arange(place.start, place.stop, device=self.stop_BT.device).unsqueeze(1)
        row_R1, position_R1 = index_R1 // self.seq_len, index_R1 % self.seq_len
        ahead_S = torch.arange(self.first, self.last + 1, device=index_R1.device)
        place_RS = position_R1 + ahead_S
        inside_RS = place_RS <= self.stop_BT.reshape(-1)[place].unsqueeze(1)
        flat_RS = row_R1 * width + place_RS.clamp_(max=width - 1)
        nearest_RS = self.before_BW.reshape(-1)[flat_RS] < position_R1 + self.first
        return self.tokens_BW.reshape(-1)[flat_RS], inside_RS & nearest_RS


def _last_of_document(documents_BW: Tensor) -> Tensor:
    """Index in the window of the last token of each token's document, [B, W]."""
    width = documents_BW.shape[1]
    places_W = torch.arange(width, device=documents_BW.device)
    inner_BV = documents_BW[:, 1:] == documents_BW[:, :-1]
    ends_BW = places_W.repeat(len(documents_BW), 1)
    ends_BW[:, :-1].masked_fill_(inner_BV, width)
    return ends_BW.flip(1).cummin(1).values.flip(1)

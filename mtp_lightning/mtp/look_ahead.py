"""Look-ahead targets: the tokens ahead of every position, and which of them count.

A position looks at the tokens ``first`` to ``last`` positions ahead, up to the end of its window
and, with a document mask, of its document. Tokens that may not be targets (the prompts of a task,
padding) do not count. If an id occurs several times, only its nearest occurrence that may be a
target counts.

Shapes: B windows, T positions, W tokens of a window, R positions of one chunk, S tokens ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_modules.windows import WindowBatch


class LookAhead:
    """The tokens ahead of every position of some windows.

    Args:
        batch: whole windows.
        first: how far ahead the nearest token is; 1 is the next one.
        last: offset of the farthest token; less at the window's end.
    """

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
        self.before_BW = _before(tokens_BW, batch.scored)

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
        row_R1, at_R1 = index_R1 // self.seq_len, index_R1 % self.seq_len
        ahead_S = torch.arange(self.first, self.last + 1, device=index_R1.device)
        seen_RS = at_R1 + ahead_S
        inside_RS = seen_RS <= self.stop_BT.reshape(-1)[place].unsqueeze(1)
        flat_RS = row_R1 * width + seen_RS.clamp_(max=width - 1)
        nearest_RS = self.before_BW.reshape(-1)[flat_RS] < at_R1 + self.first
        return self.tokens_BW.reshape(-1)[flat_RS], inside_RS & nearest_RS


def _last_of_document(documents_BW: Tensor) -> Tensor:
    """Index in the window of the last token of each token's document, [B, W]."""
    width = documents_BW.shape[1]
    places_W = torch.arange(width, device=documents_BW.device)
    inner_BV = documents_BW[:, 1:] == documents_BW[:, :-1]
    ends_BW = places_W.repeat(len(documents_BW), 1)
    ends_BW[:, :-1].masked_fill_(inner_BV, width)
    return ends_BW.flip(1).cummin(1).values.flip(1)


def _before(tokens_BW: Tensor, scored_BW: Tensor | None) -> Tensor:
    """Index of the nearest earlier token with the same id that may be a target, [B, W]; -1 for
    none, W if the token itself may not be a target."""
    key_BW = tokens_BW if scored_BW is None else tokens_BW.masked_fill(~scored_BW, -1)
    sorted_BW, order_BW = key_BW.sort(dim=1, stable=True)
    same_BV = sorted_BW[:, 1:] == sorted_BW[:, :-1]
    before_BW = torch.full_like(order_BW, -1)
    before_BW.scatter_(1, order_BW[:, 1:], order_BW[:, :-1].where(same_BV, -1))
    return before_BW.masked_fill_(key_BW < 0, tokens_BW.shape[1])

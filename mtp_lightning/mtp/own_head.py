"""An output head of the stack's own, over the most frequent tokens (EAGLE-3, arXiv 2503.01840; the
idea of FR-Spec, Zhao et al. 2025, arXiv 2502.14856).

A stack with an :attr:`MTPStack.own_head` projects all its depths with it, instead of the shared
head. Row i of the head stands for token ``tokens[i]``. Tokens without a row have probability 0: no
depth is trained on them, and they are never drafted.

Shapes: V vocabulary, N rows of the head, C d_model, R positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX
from mtp_lightning.errors import UserError
from mtp_lightning.nn.head import Head


class OwnHead(Head):
    """``logits = hidden @ weight.T`` over some tokens of the vocabulary.

    ``rows`` is N; None is V.

    Attributes:
        weight: [N, C].
        tokens: int64 [N], the token of each row, ascending; the first N until :meth:`choose`.
    """

    tokens: Tensor

    def __init__(self, vocab_size: int, d_model: int, rows: int | None = None) -> None:
        super().__init__(vocab_size if rows is None else rows, d_model)
        self.vocab_size = vocab_size
        self.register_buffer("tokens", torch.arange(len(self.weight)))
        self._tokens_copy: tuple[int, Tensor] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every token has a row."""
        return len(self.weight) == self.vocab_size

    def choose(self, counts_V: Tensor) -> None:
        """Give the rows to the most frequent tokens; among equals, to the smaller id. ``counts_V``
        is how often every id occurs, int64."""
        order = counts_V.argsort(descending=True, stable=True)
        self.tokens.copy_(order[: len(self.tokens)].sort().values)

    def require_sound(self, source: str) -> None:
        """Raise a ``UserError`` that names ``source`` for stored rows that stand for no token, or
        for the same one."""
        inside = (self.tokens >= 0) & (self.tokens < self.vocab_size)
        if not (inside.all() and (self.tokens.diff() > 0).all()):
            raise UserError(
                f"{source} is damaged or forged: its draft vocabulary does not give every row of "
                f"the head one of {self.vocab_size:,} tokens of its own, ascending."
            )

    def rows_of(self, tokens: Tensor) -> Tensor:
        """The row of every token, in the same shape; -100 for tokens without a row."""
        tokens_N = self._tokens_on(tokens.device)
        row = torch.searchsorted(tokens_N, tokens.contiguous()).clamp_(max=len(tokens_N) - 1)
        return row.masked_fill_(tokens_N[row] != tokens, IGNORE_INDEX)

    def _tokens_on(self, device: torch.device) -> Tensor:
        """``tokens``, copied only once: targets are counted on the host, and a copy in every step
        would wait for the device."""
        if device == self.tokens.device:
            return self.tokens
        version = self.tokens._version
        if self._tokens_copy is None or self._tokens_copy[0] != version:
            self._tokens_copy = version, self.tokens.to(device)
        return self._tokens_copy[1]

    def forward(self, h_BTC: Tensor) -> Tensor:
        """Logits [..., V] of states [..., C]; -inf for tokens without a row."""
        return self.over_all(super().forward(h_BTC))

    def log_probs(self, h_RC: Tensor) -> Tensor:
        return self.over_all(self.differentiable_log_probs(h_RC))

    def over_all(self, values: Tensor) -> Tensor:
        """Values of the rows [..., N] -> of all tokens [..., V]; -inf for tokens without a row."""
        if self.is_whole:
            return values
        wide = values.new_full((*values.shape[:-1], self.vocab_size), -float("inf"))
        return wide.index_copy_(-1, self.tokens, values)

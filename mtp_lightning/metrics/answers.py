"""Share of right answers, and accuracy of their tokens.

Shapes: B batch, W tokens of a window, P positions of an answer, G groups of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_lightning.metrics.sums import Sums

_ALONE = 16  # positions with their own tag; later ones share a tag per doubling


class AnswerRates(Sums):
    """Exact match, and accuracy by position and by group, over all ranks and batches.

    - ``exact_match``: share of greedily decoded answers that the task's check accepts
    - ``accuracy_position_i``: share of decoded tokens that equal the example's own at the i-th
      asked position, from 1; after a first mistake the model reads its own tokens. If several
      answers are right, one that differs from the example's counts as wrong here
    - ``forced_accuracy_position_i``: the same with the example's own tokens before it
    - ``accuracy_GROUP``: accuracy of decoded tokens in a group of the task's

    Positions beyond 16 share a tag per doubling: 17-32, 33-64, ..

    Args:
        n_positions: P, tokens of the longest answer.
        groups: names of the G groups.
    """

    answers: Tensor
    right: Tensor
    position: Tensor
    group: Tensor

    def __init__(self, n_positions: int, groups: Sequence[str]) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.add_sums("answers", "right", exact=True)
        # The columns: tokens, tokens decoded right, tokens predicted right with the example's own
        # before them.
        self.add_sums("position", shape=(n_positions, 3), exact=True)
        self.add_sums("group", shape=(len(groups), 3), exact=True)

    def update(
        self,
        right_B: Tensor,
        decoded_BW: Tensor,
        forced_BW: Tensor,
        tokens_BW: Tensor,
        position_BW: Tensor,
        group_BW: Tensor,
    ) -> None:
        """Counts one batch.

        Args:
            right_B: whether each answer is right.
            decoded_BW: the decoded tokens.
            forced_BW: the greedy choices, teacher-forced.
            tokens_BW: the examples' own tokens.
            position_BW: index of the token among the asked ones, from 0; -1 for other tokens.
            group_BW: number of its group; -1 for none.
        """
        self.answers += len(right_B)
        self.right += right_B.sum()
        hits_BWS = torch.stack(
            (torch.ones_like(decoded_BW), decoded_BW == tokens_BW, forced_BW == tokens_BW), dim=-1
        )
        for counts, index_BW in ((self.position, position_BW), (self.group, group_BW)):
            counted = index_BW >= 0
            counts.index_add_(0, index_BW[counted], hits_BWS[counted])

    def compute(self) -> dict[str, float]:
        """The values by name; a value without any count is left out."""
        rates = {"exact_match": float(self.right / self.answers)}
        for i, j in _spans(len(self.position)):
            tokens, decoded, forced = self.position[i:j].sum(0).tolist()
            name = str(i + 1) if j == i + 1 else f"{i + 1}-{j}"
            if tokens:
                rates[f"accuracy_position_{name}"] = decoded / tokens
                rates[f"forced_accuracy_position_{name}"] = forced / tokens
        for name, (tokens, decoded, _) in zip(self.groups, self.group.tolist(), strict=True):
            if tokens:
                rates[f"accuracy_{name}"] = decoded / tokens
        return rates


def _spans(n: int) -> list[tuple[int, int]]:
    """(first position, position after the last) of every tag."""
    spans = [(i, i + 1) for i in range(min(n, _ALONE))]
    start = _ALONE
    while start < n:
        spans.append((start, min(2 * start, n)))
        start *= 2
    return spans

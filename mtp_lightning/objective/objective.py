"""What the MTP depths are trained on: a term or a mixture of them, and which positions count.

``L_k = sum_TERM weight_TERM * L_k/TERM``, and each ``L_k/TERM`` is a mean over the positions of
depth k that count for the term: those that count for cross-entropy and, where the term compares
with a teacher, have one. Depth k at position t is taught by the main prediction at t + k, so the
last k positions of a window are not.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX, WindowBatch
from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.mtp.kinds import SideBySide, Targets
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.settings import require


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The group ``objective``.

    Attributes:
        term: of the depths; the main prediction keeps cross-entropy.
        train_head: whether the depths' losses train the shared head; if not, it passes their
            gradients on to the hidden states alone.
    """

    term: Term
    train_head: bool = True

    def __post_init__(self) -> None:
        require(
            isinstance(self.train_head, bool),
            "objective.train_head",
            self.train_head,
            "true or false",
        )

    @classmethod
    def options(cls) -> list[str]:
        """The keys of the group that are not the term's own."""
        return [field.name for field in fields(cls) if field.name != "term"]

    @cached_property
    def parts(self) -> list[tuple[float, Term]]:
        """The terms that are computed, each with its weight."""
        return list(self.term.parts())

    @property
    def needs_teacher(self) -> bool:
        """Whether any of them compares with the main prediction."""
        return any(term.needs_teacher for _, term in self.parts)

    def losses(self, sums_KP: Tensor, counts: PositionCounts) -> Tensor:
        """The mean loss of every depth and term [D + 1, P]; 0 where nothing was counted.

        Args:
            sums_KP: of the whole step; of the main prediction in the first column.
            counts: of the whole step.
        """
        rows = [[n, *(0 for _ in self.parts[1:])] for n in counts.valid[:1]]
        rows += [
            [counts.of(k, term) for _, term in self.parts] for k in range(1, len(counts.valid))
        ]
        return sums_KP / torch.tensor(rows, device=sums_KP.device).clamp(min=1)

    def mixed(self, losses_KP: Tensor) -> Tensor:
        """The loss of every depth [D + 1]: its terms, weighted."""
        if len(self.parts) == 1 and self.parts[0][0] == 1:
            return losses_KP[:, 0]
        weights = losses_KP.new_tensor([weight for weight, _ in self.parts])
        return torch.cat((losses_KP[:1, 0], losses_KP[1:] @ weights))

    def further_flops(
        self, config: ModelConfig, stack: MTPStack, active: Collection[int], *, main: bool
    ) -> int:
        """FLOPs of training a position that :meth:`ModelConfig.flops_per_token` does not count,
        since it takes the depths to be trained on cross-entropy.

        Args:
            config: of the model.
            stack: its stack, or one like it.
            active: depths that are computed.
            main: whether the main prediction goes through the head anyway.
        """
        head, flops = config.trunk.head_flops(), 0
        if not active:
            return 0
        if self.needs_teacher:
            if isinstance(stack, SideBySide):
                flops += len(active) * head
            elif not main:
                flops += head
            if isinstance(stack, Targets):  # each depth goes through the head by itself
                flops += len(active) * (3 if self.train_head else 2) * head
                return flops
        if not self.train_head and config.mtp.trains_trunk and config.mtp.detach != "all":
            flops -= config.mtp.projections(list(active)) * head
        return flops


CROSS_ENTROPY = Objective(term=CrossEntropy())
"""What the depths learn where nothing else is said."""


@dataclass(frozen=True)
class PositionCounts:
    """Positions that count in an optimizer step, of all ranks.

    Attributes:
        valid: [D + 1], those with a valid target.
        taught: [D + 1], those of them that have a teacher; None where nobody asks.
    """

    valid: list[int]
    taught: list[int] | None = None

    def of(self, k: int, term: Term) -> int:
        """Those of depth ``k`` that count for a term."""
        if not term.needs_teacher:
            return self.valid[k]
        assert self.taught is not None
        return self.taught[k]


def taught_targets(batch: WindowBatch, k: int) -> Tensor:
    """``[B, T]`` targets of depth k, -100 also where the main prediction of the same token lies
    beyond the window: at the last k positions."""
    targets_BT = batch.targets(k).clone()
    targets_BT[:, max(batch.seq_len - k, 0) :] = IGNORE_INDEX
    return targets_BT


def count_taught(batch: WindowBatch) -> Tensor:
    """``[D + 1]`` int64 number of positions of every depth that have a teacher, and count."""
    targets = [taught_targets(batch, k) for k in range(batch.depth + 1)]
    return torch.stack([(tokens_BT != IGNORE_INDEX).sum() for tokens_BT in targets])

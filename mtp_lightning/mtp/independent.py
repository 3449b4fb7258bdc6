"""What stacks have in common whose depths read the branch point alone, and no token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.mtp.switches import Detach


class IndependentMTP(MTPStack):
    """D heads side by side: each can be computed, and trained, without the others.

    See ``objective/head_by_head.py`` for what training makes of it.

    Args:
        heads: one a depth.
        detach: the switch of that name.
    """

    def __init__(self, heads: Sequence[nn.Module], *, detach: Detach) -> None:
        super().__init__(len(heads))
        self.depths = nn.ModuleList(heads)
        self._detach = detach

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """The parameters of depth ``k``."""
        return list(self.depths[k - 1].parameters())

    @property
    def reads_tokens(self) -> bool:
        return False

    @property
    def trains_head(self) -> bool:
        return self._detach != "all"

    def steps(self, active: Sequence[int]) -> list[int]:
        return sorted(active)

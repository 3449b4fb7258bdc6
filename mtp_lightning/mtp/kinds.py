"""The three kinds of stack, by what a depth reads.

======================  ==========================================  =======================
kind                    depth k reads                               variants
======================  ==========================================  =======================
:class:`Chain`          the true tokens up to i + k, depth k - 1    sequential
:class:`SideBySide`     the branch point alone                      parallel, linear
:class:`Targets`        nothing: it is the main prediction's own    parameter_free, none
======================  ==========================================  =======================
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from mtp_lightning.mtp.base import BranchPoint, DepthInputs, MTPConfig, MTPStack, RandomKey
from mtp_lightning.nn.attention import Positions


class Chain(MTPStack):
    """Each depth reads the one before it and one true token more.

    What decoding stored for a rejected draft is therefore computed again.
    """

    @abstractmethod
    def step(
        self, k: int, previous_BTC: Tensor, embedded_BTC: Tensor, positions: Positions
    ) -> Tensor:
        """Hidden state [B, T, C] of depth ``k`` from that of depth ``k - 1`` (the branch at
        ``k = 1``) and from its token input."""

    def input_of(self, k: int, history: Sequence[Tensor], key: RandomKey | None) -> Tensor:
        """The hidden state [B, T, C] that depth ``k`` starts from over whole windows.

        Args:
            k: the depth.
            history: the branch, and the hidden states of the depths computed so far.
            key: of the random choices in training; None makes none.
        """
        return history[-1]

    def tokens_of(self, k: int, embedded_BTC: Tensor, key: RandomKey | None) -> Tensor:
        """The token input [B, T, C] of depth ``k``.

        Args:
            k: the depth.
            embedded_BTC: the true tokens' embeddings, ``k`` places on.
            key: of the random choices in training; None makes none.
        """
        return embedded_BTC

    def states(
        self, at: BranchPoint, active: Sequence[int], key: RandomKey | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        history = [at.hidden]
        for k in self.computed(active):
            previous = self.input_of(k, history, key)
            tokens = self.tokens_of(k, at.embedded_at(k), key)
            history.append(self.step(k, previous, tokens, at.positions))
            if k in active:
                yield k, history[-1]

    def depth_state(self, k: int, read: DepthInputs) -> Tensor:
        tokens = self.tokens_of(k, read.embedded, None)
        return self.step(k, read.previous, tokens, read.positions)

    def computed(self, active: Sequence[int]) -> list[int]:
        return list(range(1, max(active, default=0) + 1))

    def ahead(self, active: Sequence[int]) -> int:
        return max(active, default=0)


class SideBySide(MTPStack):
    """D heads that can be computed, and trained, without each other.

    Args:
        config: of the variant.
        heads: one a depth.
    """

    def __init__(self, config: MTPConfig, heads: Sequence[nn.Module]) -> None:
        super().__init__(config)
        self.depths = nn.ModuleList(heads)

    @abstractmethod
    def step(self, k: int, branch_BTC: Tensor, positions: Positions) -> Tensor:
        """Hidden state [B, T, C] of depth ``k`` from the branch."""

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """The parameters of depth ``k``."""
        return list(self.depths[k - 1].parameters())

    def states(
        self, at: BranchPoint, active: Sequence[int], key: RandomKey | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        for k in self.computed(active):
            yield k, self.step(k, at.hidden, at.positions)

    def depth_state(self, k: int, read: DepthInputs) -> Tensor:
        return self.step(k, read.branch, read.positions)


class Targets(MTPStack):
    """No module: every depth is the main prediction, asked for a target further on."""

    def states(
        self, at: BranchPoint, active: Sequence[int], key: RandomKey | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        for k in self.computed(active):
            yield k, at.hidden

    def depth_state(self, k: int, read: DepthInputs) -> Tensor:
        return read.branch

    @property
    def max_draft_depth(self) -> int | None:
        return 0

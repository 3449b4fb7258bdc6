"""What every way of predicting several tokens has in common.

Shapes: B batch, T positions, C d_model, K depths. Depth 0 is the next token, the trunk's own
prediction; depths 1 .. D are the stack's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.trunk import Trunk, TrunkOutput


@dataclass(frozen=True, kw_only=True)
class MTPConfig(ABC):
    """Depth and switches of a stack, and what it costs, before it is built.

    Attributes:
        depth: D, tokens predicted beyond the next one; 0 is plain next-token training.

    Raises:
        ValueError: a negative depth.
    """

    depth: int

    def __post_init__(self) -> None:
        if not isinstance(self.depth, int) or isinstance(self.depth, bool) or self.depth < 0:
            raise ValueError(f"mtp.depth must be a whole number of at least 0, not {self.depth}.")

    @abstractmethod
    def build(self, trunk: TrunkConfig) -> MTPStack:
        """The stack itself, uninitialised."""

    @abstractmethod
    def num_params(self, trunk: TrunkConfig) -> int:
        """Weights that the stack adds to the trunk's."""

    @abstractmethod
    def flops(self, trunk: TrunkConfig, seq_len: int, active: Sequence[int]) -> int:
        """Forward FLOPs of one position for the ``active`` depths, the shared head included."""


class MTPStack(nn.Module, ABC):
    """A stack on a trunk: a branch point, and one step a depth.

    Training maps :meth:`step` over whole windows, decoding over the newest positions: it is the
    one place where a depth is computed, so the two cannot drift apart.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth

    @abstractmethod
    def branch(self, trunk: Trunk, output: TrunkOutput) -> Tensor:
        """The trunk's hidden state [B, T, C] that the stack starts from."""

    @abstractmethod
    def step(
        self,
        k: int,
        *,
        branch_BTC: Tensor,
        previous_BTC: Tensor,
        embedded_BTC: Tensor,
        positions: Positions,
    ) -> Tensor:
        """Hidden state of depth ``k`` (1 .. D), ready for the shared head.

        Args:
            k: the depth.
            branch_BTC: what :meth:`branch` gave.
            previous_BTC: the hidden state of depth ``k - 1``; at ``k = 1`` the branch.
            embedded_BTC: embeddings of the tokens ``k`` places on: ``Emb(w[k : T + k])``.
            positions: of the window's own positions, not shifted; its cache, if any, is depth
                ``k``'s own.

        Returns:
            [B, T, C].
        """

    @property
    def trains_head(self) -> bool:
        """Whether the depths' losses reach the shared head's weight."""
        return True

    def needed(self, active: Sequence[int]) -> int:
        """How many steps, from depth 1 on, the ``active`` depths ask for."""
        return max(active, default=0)

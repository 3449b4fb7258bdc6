"""What every way of predicting several tokens has in common.

Shapes: B batch, T positions, C d_model, K depths. Depth 0 is the next token, the trunk's own
prediction; depths 1 .. D are the stack's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mtp_lightning.mtp.switches import check_switches
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

    # Settings without which the weights mean something else: a stack can only go on from another
    # (init_from) where these agree.
    meaning: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.depth, int) or isinstance(self.depth, bool) or self.depth < 0:
            raise ValueError(f"mtp.depth must be a whole number of at least 0, not {self.depth}.")
        check_switches(self)

    @property
    def trains_trunk(self) -> bool:
        """Whether embedding, trunk and head are trained."""
        return not getattr(self, "freeze_trunk", False)

    @abstractmethod
    def build(self, trunk: TrunkConfig) -> MTPStack:
        """The stack itself, uninitialised."""

    @abstractmethod
    def num_params(self, trunk: TrunkConfig) -> int:
        """Weights that the stack adds to the trunk's."""

    def num_idle_params(self, trunk: TrunkConfig) -> int:
        """Those of them that a token does not go through: experts it is not sent to."""
        return 0

    @abstractmethod
    def module_flops(self, trunk: TrunkConfig, seq_len: int, active: Sequence[int]) -> int:
        """Forward FLOPs of one position for the ``active`` depths, the shared head left out."""

    def projections(self, active: Sequence[int]) -> int:
        """How many times more than the trunk alone a position goes through the shared head."""
        return len(active)

    def flops(self, trunk: TrunkConfig, seq_len: int, active: Sequence[int]) -> int:
        """Forward FLOPs of one position for the ``active`` depths, the shared head included."""
        head = self.projections(active) * trunk.head_flops()
        return self.module_flops(trunk, seq_len, active) + head


@dataclass(frozen=True)
class Draw:
    """What a random choice in training depends on, and nothing else: so nothing need be stored.

    Attributes:
        seed: of the run.
        step: optimizer step, from 0.
        first_row: index in the step's global batch of this micro-batch's first window. The
            choices therefore do not depend on accumulation or on the number of ranks.
    """

    seed: int
    step: int
    first_row: int = 0


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
    def max_draft_depth(self) -> int | None:
        """Tokens that decoding can draft in one go; None is any number."""
        return self.depth

    @property
    def reads_tokens(self) -> bool:
        """Whether a step depends on the embedded tokens or the previous depth.

        Where it does, what decoding stored for a rejected draft is computed again.
        """
        return True

    @property
    def trains_head(self) -> bool:
        """Whether the depths' losses reach the shared head's weight."""
        return True

    @property
    def shares_hidden(self) -> bool:
        """Whether every depth's hidden state is the trunk's, so that logits are made once."""
        return False

    @property
    def drafts(self) -> bool:
        """Whether decoding can draft with this stack."""
        return self.max_draft_depth != 0

    def require_drafts(self) -> None:
        """Refuse to draft with a stack that cannot.

        Raises:
            ValueError: saying why.
        """
        if not self.drafts:
            raise ValueError("this model has no MTP depth to draft with: decode it without drafts.")

    def steps(self, active: Sequence[int]) -> list[int]:
        """The depths to compute, in order, so that the ``active`` ones are known."""
        return list(range(1, max(active, default=0) + 1))

    def input_of(self, k: int, history: Sequence[Tensor], draw: Draw | None) -> Tensor:
        """The hidden state [B, T, C] that depth ``k`` starts from over whole windows.

        Args:
            k: the depth.
            history: the branch, and the hidden states of the depths computed so far.
            draw: what random choices depend on in training; None chooses nothing at random.
        """
        return history[-1]

    def initialise_own(self) -> None:
        """Set what does not start from the common random draw; called after it."""

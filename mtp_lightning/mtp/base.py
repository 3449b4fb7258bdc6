"""What every way of predicting several tokens has in common.

Shapes: B batch, T positions, C d_model, K depths. Depth 0 is the next token, the trunk's own
prediction; depths 1 .. D are the stack's. A stack is of one of the three kinds in ``kinds.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.confidence import Confidence
from mtp_lightning.mtp.feed import Feed, OwnLoss, Together
from mtp_lightning.mtp.switches import Switches, branch_state, check_switches
from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.init import parameter_seed
from mtp_lightning.nn.trunk import Trunk, TrunkOutput
from mtp_lightning.registry import Registered
from mtp_lightning.settings import require_whole


@dataclass(frozen=True, kw_only=True)
class MTPConfig(Switches, Registered, ABC, family="mtp"):
    """Depth and switches of a stack, and what it costs, before it is built.

    A variant adds the switches it has as fields; those it does not have keep the values of
    :class:`~mtp_lightning.mtp.switches.Switches`.

    Attributes:
        depth: D, tokens predicted beyond the next one; 0 is plain next-token training.
        confidence: whether every depth also says how sure it is (``objective.confidence``).

    Raises:
        UserError: a depth that is no whole number of at least 0, or a switch out of range.
    """

    depth: int
    confidence: bool = False

    # Settings without which the weights mean something else: a stack can only go on from another
    # (init_from) where these agree.
    meaning: ClassVar[tuple[str, ...]] = ()
    # Whether the trunk reads windows without their answers: such a model gives a task's answers
    # all at once, and cannot be decoded token by token.
    answers_at_once: ClassVar[bool] = False
    # Whether a depth's hidden state predicts one token, through the shared head: then it has an
    # accuracy, an agreement and an overlap. Else it has a loss alone, if that, and drafts nothing.
    predicts_tokens: ClassVar[bool] = True
    # Whether the depths have a loss of their own, by a matrix of their own (MTPStack.own_loss).
    brings_loss: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_whole("mtp.depth", self.depth, least=0)
        check_switches(self)

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        # Stacks that have none are stored as ever.
        return data if self.confidence else {k: v for k, v in data.items() if k != "confidence"}

    @property
    def trains_trunk(self) -> bool:
        """Whether embedding, trunk and head are trained."""
        return not self.freeze_trunk

    @property
    def places_ahead(self) -> int:
        """How far ahead of a position the stack looks; windows hold D + 1 places in any case."""
        return self.depth + 1

    def check_window(self, seq_len: int) -> None:
        """Refuse windows of ``seq_len`` positions that do not hold the targets.

        Raises:
            UserError: naming both.
        """

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

    def trunk_flops(
        self,
        trunk: TrunkConfig,
        seq_len: int,
        active: Sequence[int],
        layers: Sequence[int] | None = None,
    ) -> int:
        """Forward FLOPs of the trunk's blocks, ``layers`` or all, for one position, where the
        ``active`` depths are computed."""
        layers = range(trunk.n_layers) if layers is None else layers
        return sum(trunk.block_flops(seq_len, layer) for layer in layers)

    def module_backward_flops(self, trunk: TrunkConfig, seq_len: int, active: Sequence[int]) -> int:
        """Backward FLOPs of the same; by default twice as many, for weights and for inputs."""
        return 2 * self.module_flops(trunk, seq_len, active)

    def alone_flops(self, trunk: TrunkConfig, seq_len: int, k: int, active: Sequence[int]) -> int:
        """Forward FLOPs of one position that a backward pass of depth ``k`` alone goes back
        through, where the ``active`` depths were computed together."""
        return self.module_flops(trunk, seq_len, [k])

    def projections(self, active: Sequence[int]) -> int:
        """How many times more than the trunk alone a position goes through the shared head."""
        return len(active)

    def flops(self, trunk: TrunkConfig, seq_len: int, active: Sequence[int]) -> int:
        """Forward FLOPs of one position for the ``active`` depths, the shared head included."""
        head = self.projections(active) * trunk.head_flops()
        return self.module_flops(trunk, seq_len, active) + head


@dataclass(frozen=True)
class RandomKey:
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

    def generator(self, what: str, row: int) -> torch.Generator:
        """The random numbers of a purpose, which names the step, for one window."""
        name = f"{what}:{self.first_row + row}"
        return torch.Generator().manual_seed(parameter_seed(self.seed, name))


@dataclass(frozen=True)
class BranchPoint:
    """Where a stack leaves the trunk: all that its depths read of the trunk and of the text, over
    whole windows or at decoding's newest positions.

    Attributes:
        hidden: the trunk's state [B, T, C] that the stack starts from.
        tokens: int64 token ids [B, at least T], those beyond T for the depths that read them.
        embedded: their embeddings [B, at least T, C].
        positions: of the T tokens, not shifted; at decoding, its cache is one depth's own.
        first: how many places on the first of ``tokens`` stands from the first of the T positions.
        stride: how far the tokens one place on are from these, among ``tokens``: 1 in a text; T
            where those of every place are a list of their own, [B, places T].
        head: the shared one, for depths that rest on how likely a token was; None in training.
    """

    hidden: Tensor
    tokens: Tensor
    embedded: Tensor
    positions: Positions = field(repr=False)
    first: int = 0
    stride: int = 1
    head: Head | None = field(default=None, repr=False)

    def tokens_at(self, k: int) -> Tensor:
        """The tokens ``k`` places on, ``w[k : T + k]`` [B, T]."""
        start = (k - self.first) * self.stride
        return self.tokens[:, start : start + self.hidden.shape[1]]

    def embedded_at(self, k: int) -> Tensor:
        """Their embeddings [B, T, C]."""
        start = (k - self.first) * self.stride
        return self.embedded[:, start : start + self.hidden.shape[1]]


@dataclass(frozen=True)
class TrunkText:
    """What a finished trunk makes of some windows of text.

    Attributes:
        at: where a stack starts, over T positions.
        before_last: state before the last block [B, T + D, C].
        documents: ids [B, T + D]; a state of another document is not to be guessed. None for one.
    """

    at: BranchPoint
    before_last: Tensor
    documents: Tensor | None

    def wanted(self, k: int, x_BTX: Tensor) -> tuple[Tensor, Tensor]:
        """What depth k reads, and the state that its block should be given: [N, ..] and [N, C]."""
        seq_len = x_BTX.shape[1]
        y_BTC = self.before_last[:, k : seq_len + k]
        if self.documents is None:
            return x_BTX.flatten(0, 1), y_BTC.flatten(0, 1)
        same_BT = self.documents[:, :seq_len] == self.documents[:, k : seq_len + k]
        return x_BTX[same_BT], y_BTC[same_BT]


class MTPStack(nn.Module, ABC):
    """A stack on a trunk: a branch point, and a hidden state a depth.

    Args:
        config: of the variant.

    Attributes:
        confidence: how sure the depths are of their drafts; None without ``config.confidence``.
    """

    # Whether a depth attends to positions before its own: then decoding stores its keys and values.
    attends_back: ClassVar[bool] = True
    # Whether depths are trained one after another: each makes a teacher of its own, and what must
    # be known of all beforehand computes each of them twice.
    in_turn: ClassVar[bool] = False
    # Whether every depth is the main prediction's own hidden state.
    shares_state: ClassVar[bool] = False
    confidence: Confidence | None

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.config = config
        self.confidence = None

    @property
    def depth(self) -> int:
        """D."""
        return self.config.depth

    def tokens_read(self, tokens_BW: Tensor, scored_BW: Tensor | None) -> Tensor:
        """The tokens that trunk and depths read in the place of a batch's.

        Args:
            tokens_BW: of whole windows, W = T + D + 1.
            scored_BW: which of them may be targets; None for all.
        """
        return tokens_BW

    def target_depth(self, k: int, key: RandomKey | None = None) -> int:
        """Whose targets depth ``k`` is trained on: those ``target_depth + 1`` places on.

        Args:
            k: 0 for the main prediction.
            key: of the random choices in training.
        """
        return k

    def valid(self, k: int, batch: WindowBatch, key: RandomKey | None = None) -> Tensor | None:
        """Which positions of depth ``k`` (0 is the main prediction) count, bool [B, T]; None if all
        do. ``key`` is that of the random choices in training."""
        own = self.own_loss(k, batch) if k else None
        return batch.valid(self.target_depth(k, key)) if own is None else own.valid_BT

    def own_loss(self, k: int, batch: WindowBatch) -> OwnLoss | None:
        """The loss of depth ``k`` over some windows, in the place of the objective's; the depths of
        a stack whose config says ``brings_loss`` have one."""
        return None

    def feed(
        self,
        final_BTC: Tensor,
        at: BranchPoint,
        batch: WindowBatch,
        depths: Sequence[int],
        key: RandomKey | None = None,
    ) -> Feed:
        """How the stack is trained on a micro-batch: what goes through the head, in which order.

        Args:
            final_BTC: the trunk's final states, from :meth:`MTPModel.run_trunk`.
            at: what the stack branches from, from the same.
            batch: the windows.
            depths: that are trained, in order.
            key: of the random choices in training; None makes none.
        """
        losses = {k: self.own_loss(k, batch) for k in depths}
        own = {k: loss for k, loss in losses.items() if loss is not None}
        return Together(final_BTC, list(self.states(at, depths, key)), own)

    def through_trunk(
        self, trunk: Trunk, embedded_BTC: Tensor, positions: Positions, key: RandomKey | None = None
    ) -> tuple[TrunkOutput, Tensor]:
        """The trunk over whole windows, and the hidden state [B, T, C] that the stack starts from.

        Args:
            trunk: the trunk.
            embedded_BTC: of the windows' tokens.
            positions: of them.
            key: of the random choices in training.
        """
        output = trunk(embedded_BTC, positions)
        return output, self.branch(trunk, output)

    def branch(self, trunk: Trunk, output: TrunkOutput) -> Tensor:
        """The trunk's hidden state [B, T, C] that the stack starts from."""
        return branch_state(trunk, output, self.config)

    def main_state(self, final_BTC: Tensor) -> Tensor:
        """What of the trunk's output [..., C] the head makes the main prediction of."""
        return final_BTC

    @abstractmethod
    def states(
        self, at: BranchPoint, active: Sequence[int], key: RandomKey | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The ``active`` depths over whole windows, in order: (k, [B, T, C]) ready for the head.

        Of a depth that no other reads, nothing is kept when the next one is asked for.

        Args:
            at: where the stack starts.
            active: depths in 1 .. D.
            key: of the random choices in training; None makes none.
        """

    @abstractmethod
    def depth_state(self, k: int, at: BranchPoint, previous_BTC: Tensor) -> Tensor:
        """Depth ``k`` over decoding's newest positions, [B, T, C] ready for the head.

        It computes what :meth:`states` does, so the two cannot drift apart.

        Args:
            k: the depth.
            at: what it may read: of tokens, those from ``first_token(k)`` to k places on.
            previous_BTC: the hidden state of the depth before; of depth 1, the branch.
        """

    def state_width(self, d_model: int) -> int:
        """Numbers of a depth's hidden state."""
        return d_model

    def first_token(self, k: int) -> int:
        """How far ahead the first token stands that depth ``k`` reads by itself."""
        return k

    def computed(self, active: Sequence[int]) -> list[int]:
        """The depths that must be computed so that the ``active`` ones are known."""
        return sorted(active)

    def ahead(self, active: Sequence[int]) -> int:
        """Tokens beyond the window's T that :meth:`states` reads."""
        return 0

    @property
    def reads_tokens(self) -> bool:
        """Whether depths are given true tokens beyond the main prediction's: then a depth's loss is
        that of the token after one it has seen, else of a token k places beyond the next."""
        return self.ahead(range(1, self.depth + 1)) > 0

    @property
    def max_draft_depth(self) -> int | None:
        """Tokens that decoding can draft in one go; None is any number."""
        return self.depth

    @property
    def is_recursive(self) -> bool:
        """Whether one module with a cache reads its own output, so that one cache can do."""
        return False

    def require_drafts(self) -> None:
        """Refuse to draft with a stack that cannot.

        Raises:
            UserError: saying why.
        """
        if self.max_draft_depth == 0:
            raise UserError("this model has no MTP depth to draft with: decode it without drafts.")

    def look_at(self, document_frequency: Callable[[], tuple[Tensor, int]]) -> None:
        """Learn of the training documents what the loss needs, before the first step.

        Args:
            document_frequency: gives, of every id, the documents that hold it, and their number.
        """

    def initialise_own(self) -> None:
        """Set what does not start from the common random draw; called after it."""

    def check_beginning(self, trunk: Trunk) -> None:
        """Refuse a trunk that the stack's modules cannot begin on.

        Raises:
            UserError: ``mtp.init`` asks for what it does not have.
        """

    def begin(self, fresh: Collection[int], trunk: Trunk, text: TrunkText | None) -> None:
        """Set what of the fresh modules starts from a finished trunk.

        Args:
            fresh: indices of modules without weights of their own yet.
            trunk: with its weights.
            text: what it makes of some text, unless ``mtp.init=random``.
        """

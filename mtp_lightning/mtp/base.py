"""The interface of every way of predicting several tokens: a config, and the stack that it builds.

Depth 0 is the next token, the trunk's own prediction; depths 1 .. D are the stack's. Most stacks
are of one of the three kinds in ``kinds.py``.

Shapes: B batch, T positions, C d_model, D depths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from data_modules.windows import IGNORE_INDEX, WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.confidence import Confidence
from mtp_lightning.mtp.feed import Feed, HeadWeight, OwnLoss, Together
from mtp_lightning.mtp.inputs import BranchPoint, FeedInputs, RandomKey
from mtp_lightning.mtp.last_block import TrunkText
from mtp_lightning.mtp.own_head import OwnHead
from mtp_lightning.mtp.rescoring import Rescorer
from mtp_lightning.mtp.switches import Switches, check_switches
from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.trunk import Trunk, TrunkOutput
from mtp_lightning.registry import Registered
from mtp_lightning.settings import require, require_whole


@dataclass(frozen=True, kw_only=True)
class MTPConfig(Switches, Registered, ABC, family="mtp"):
    """Depth and switches of a stack.

    A variant adds its switches as fields; the others keep the values of
    :class:`~mtp_lightning.mtp.switches.Switches`.

    Attributes:
        depth: D, tokens predicted beyond the next one; 0 is plain next-token training.
        confidence: whether every depth also estimates the acceptance of its drafts
            (``objective.confidence``).

    Raises:
        UserError: the depth is not a whole number of at least 0, or a switch of the variant has an
            unknown value, or no effect.
    """

    depth: int
    confidence: bool = False

    # The only depth that the variant has; None for any.
    fixed_depth: ClassVar[int | None] = None
    # Settings that change the meaning of the weights: init_from requires them to be equal.
    meaning: ClassVar[tuple[str, ...]] = ()
    # Whether the trunk reads windows with their answers hidden. Such a model predicts a task's
    # whole answer at once and cannot be decoded token by token.
    answers_at_once: ClassVar[bool] = False
    # Whether a depth's hidden state predicts one token through the shared head, so that the depth
    # has an accuracy, an agreement and an overlap. Otherwise it has a loss at most, and no drafts.
    predicts_tokens: ClassVar[bool] = True
    # Whether the depths have their own loss, with their own matrix (MTPStack.own_loss).
    brings_loss: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_whole("mtp.depth", self.depth, least=0)
        if self.fixed_depth is not None:
            wanted = f"{self.fixed_depth} with mtp={self.variant}"
            require(self.depth == self.fixed_depth, "mtp.depth", self.depth, wanted)
        check_switches(self)

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        # Left out if false, as in checkpoints older than the setting.
        return data if self.confidence else {k: v for k, v in data.items() if k != "confidence"}

    @property
    def trains_trunk(self) -> bool:
        """Whether embedding, trunk and head are trained."""
        return not self.freeze_trunk

    @property
    def places_ahead(self) -> int:
        """How many tokens ahead of a position the stack looks; windows hold at least D + 1."""
        return self.depth + 1

    def check_window(self, seq_len: int) -> None:
        """Refuse windows of ``seq_len`` positions that are too short for the targets.

        Raises:
            UserError: naming the setting and the window's length.
        """

    def check_objective(self, draft_rules: Sequence[str], separate_training: Sequence[str]) -> None:
        """Refuse settings of the objective that have no meaning for the stack.

        Args:
            draft_rules: settings of rules about drafts, such as ``objective.mask=entropy``.
            separate_training: settings that train a depth's state or head apart from the main
                prediction's.

        Raises:
            UserError: naming the setting, the switch of the stack and the remedy.
        """

    def export_obstacle(self) -> str:
        """Why no other program computes the next token of a model of this stack, after "a model of
        mtp=NAME "; empty if one can."""
        return ""

    @abstractmethod
    def build(self, trunk: TrunkConfig) -> MTPStack:
        """The stack, with its weights not yet initialized."""


class MTPStack(nn.Module, ABC):
    """A stack on a trunk: it turns the trunk's state at the branch point into one hidden state per
    depth.

    A subclass must define :meth:`depth_state`; one of a kind of ``kinds.py`` defines ``step``
    instead. All else has a default.

    Args:
        config: the variant's.

    Attributes:
        confidence: estimates the acceptance of drafts; None without ``config.confidence``.
        rescorer: changes the drafts' logits by the token before; None where drafts are chosen by
            the head's own.
    """

    # How many blocks of a depth attend to earlier positions, so that decoding keeps their entries.
    cached_blocks: int = 1
    # Whether drafts attend to the cache entries of earlier drafts, so that all depths share the
    # first depth's cache.
    one_cache: ClassVar[bool] = False
    # Whether depths are trained one after another.
    in_turn: ClassVar[bool] = False
    # Whether a depth is computed from the one before it.
    chained: ClassVar[bool] = False
    # Whether depth k reads true tokens up to k positions ahead.
    reads_ahead: bool = False
    confidence: Confidence | None
    rescorer: Rescorer | None

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.config = config
        self.confidence = None
        self.rescorer = None

    @property
    def depth(self) -> int:
        """D."""
        return self.config.depth

    # Reading the trunk.
    @property
    def blocks_kept(self) -> Collection[int]:
        """After how many of the trunk's blocks :meth:`branch` reads the state, besides the states
        that every pass returns."""
        return ()

    def through_trunk(
        self, trunk: Trunk, embedded_BTC: Tensor, positions: Positions, key: RandomKey | None = None
    ) -> tuple[TrunkOutput, Tensor]:
        """The trunk over whole windows, and the hidden state [B, T, C] that the stack starts from.

        Args:
            trunk: the trunk.
            embedded_BTC: embeddings of the windows' tokens.
            positions: their positions.
            key: key of the random choices in training.
        """
        output = trunk(embedded_BTC, positions)
        return output, self.branch(trunk, output)

    def branch(self, trunk: Trunk, output: TrunkOutput) -> Tensor:
        """The trunk's hidden state [B, T, C] that the stack starts from; with ``config.n_states``,
        so many states side by side."""
        hidden = trunk.state(output, self.config.start_state)
        # Detach once, before the loop over depths: detached at every depth, the earlier modules
        # would learn only from their own loss.
        return hidden if self.config.detach == "none" else hidden.detach()

    def main_state(self, final_BTC: Tensor) -> Tensor:
        """The head's input for the main prediction, from the trunk's output [..., C]."""
        return final_BTC

    # Training targets.
    def tokens_read(self, tokens_BW: Tensor, scored_BW: Tensor | None) -> Tensor:
        """The tokens that trunk and depths read instead of the batch's.

        Args:
            tokens_BW: tokens of whole windows, W = T + D + 1.
            scored_BW: which of them may be targets; None for all.
        """
        return tokens_BW

    def target_depth(self, k: int, key: RandomKey | None = None) -> int:
        """Depth ``k`` is trained on the tokens ``target_depth + 1`` positions ahead.

        Args:
            k: the depth; 0 is the main prediction.
            key: key of the random choices in training.
        """
        return k

    def valid(self, k: int, batch: WindowBatch, key: RandomKey | None = None) -> Tensor | None:
        """Which positions count for depth ``k``, bool [B, T], or None for all; arguments as in
        :meth:`target_depth`."""
        if k and self.own_head is not None and not self.own_head.is_whole:
            return self.targets(k, batch, key) != IGNORE_INDEX
        if batch.every_target_counts:  # known without computing a loss's mask
            return None
        own = self.own_loss(k, batch) if k else None
        return batch.valid(self.target_depth(k, key)) if own is None else own.valid_BT

    def targets(self, k: int, batch: WindowBatch, key: RandomKey | None = None) -> Tensor:
        """The targets of depth ``k``, [B, T], as rows of its head: token ids for the shared one;
        -100 where none counts. Arguments as in :meth:`target_depth`."""
        tokens_BT = batch.targets(self.target_depth(k, key))
        return tokens_BT if not k or self.own_head is None else self.own_head.rows_of(tokens_BT)

    def own_loss(self, k: int, batch: WindowBatch) -> OwnLoss | None:
        """The loss of depth ``k`` over some windows, used instead of the objective's; None for
        stacks without ``config.brings_loss``."""
        return None

    # Its head.
    @property
    def own_head(self) -> OwnHead | None:
        """The head that projects the depths' hidden states; None for the shared head."""
        return None

    def feed(self, inputs: FeedInputs) -> Feed:
        """How the stack is trained on a micro-batch: which states go through the head, in which
        order."""
        losses = {k: self.own_loss(k, inputs.batch) for k in inputs.depths}
        own = {k: loss for k, loss in losses.items() if loss is not None}
        states = list(self.states(inputs.at, inputs.depths, inputs.key))
        head = self.own_head
        if head is None:
            return Together(inputs.final_BTC, states, own)
        tokens_N = None if head.is_whole else head.tokens
        return Together(inputs.final_BTC, states, own, HeadWeight(head.weight, tokens_N=tokens_N))

    # Its states over whole windows.
    def states(
        self, at: BranchPoint, active: Sequence[int], key: RandomKey | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The ``active`` depths over whole windows, in order: (k, [B, T, C]) ready for the head; by
        default each from the branch alone, as :meth:`depth_state` computes it.

        A generator: a depth that no other depth reads is released when the next one is asked for.

        Args:
            at: the branch point.
            active: depths in 1 .. D.
            key: key of the random choices in training; None for no random choices.
        """
        for k in self.with_prerequisites(active):
            yield k, self.depth_state(k, at, at.hidden)

    def head_input(self, hidden: Tensor) -> Tensor:
        """The head's input for a depth, from its :meth:`depth_state` [..., C]."""
        return hidden

    def with_prerequisites(self, active: Sequence[int]) -> list[int]:
        """The ``active`` depths and those that they are computed from, in order."""
        return list(range(1, max(active, default=0) + 1)) if self.chained else sorted(active)

    def ahead(self, k: int) -> int:
        """How many of the tokens ahead of a position depth ``k`` reads."""
        return k if self.reads_ahead else 0

    @property
    def reads_tokens(self) -> bool:
        """Whether depth k is given the true tokens up to k positions ahead (teacher forcing). If
        not, it predicts k tokens beyond the next without seeing those between."""
        return self.rescorer is not None or self.ahead(self.depth) > 0

    def state_width(self, d_model: int) -> int:
        """Width of a depth's hidden state."""
        return d_model

    # Drafting.
    @abstractmethod
    def depth_state(self, k: int, at: BranchPoint, previous_BTC: Tensor) -> Tensor:
        """Depth ``k`` while decoding, at the newest positions, [B, T, C]: the state that the next
        depth reads. :meth:`head_input` of it must equal what :meth:`states` yields in training.

        Args:
            k: the depth.
            at: the branch point, with the tokens from ``first_token(k)`` to k positions ahead.
            previous_BTC: the hidden state of depth ``k - 1``; for depth 1, the branch.
        """

    def rescore(self, k: int, hidden: Tensor, logits: Tensor, before: Tensor) -> Tensor:
        """The logits [..., V] that drafts of depth ``k`` are chosen by, from the head's; arguments
        as of :meth:`Rescorer.forward`."""
        return logits if self.rescorer is None else self.rescorer(k, hidden, logits, before)

    def first_token(self, k: int) -> int:
        """The offset of the first token that depth ``k`` reads."""
        return k

    @property
    def appended(self) -> int:
        """How many positions the stack appends to a text to get its branch state in decoding, at
        most; 0 for stacks that start from the trunk's own states."""
        return 0

    def append(self, trunk: Trunk, positions: Positions) -> Tensor:
        """The branch state [B, 1, ..] of the newest token read, from a pass of the trunk over the
        positions after it. The trunk's cache keeps nothing of that pass.

        Args:
            trunk: the trunk.
            positions: :attr:`appended` positions or fewer, open in the trunk's cache.
        """
        raise NotImplementedError

    @property
    def max_draft_depth(self) -> int | None:
        """The most tokens that decoding can draft per round; None for any number."""
        return self.depth

    @property
    def is_recursive(self) -> bool:
        """Whether a single module with a cache reads its own output, so that all its drafts can use
        one cache."""
        return self.cached_blocks > 0 and self.max_draft_depth is None

    def require_drafts(self) -> None:
        """Refuse to draft with a stack that cannot.

        Raises:
            UserError: naming the reason.
        """
        if self.max_draft_depth == 0:
            raise UserError("this model has no MTP depth to draft with: decode it without drafts.")

    # Initialization.
    def observe_training_text(self, data: Any) -> None:
        """Read statistics of the training documents that the loss needs, before the first step.

        Args:
            data: a data module; counting the ids of its ``training_text`` takes a pass over it.

        Raises:
            UserError: a task has no such text.
        """

    def reset_own_weights(self) -> None:
        """Set weights that do not keep their random initialization; called after it."""

    def validate_loaded(self, source: str) -> None:
        """Refuse what no training could have stored, after weights were loaded from ``source``.

        Raises:
            UserError: naming the source.
        """

    def init_from_trunk(
        self, fresh: Collection[int], trunk: Trunk, head: Head, text: TrunkText | None
    ) -> None:
        """Initialize new modules from a trained trunk, where ``mtp.init`` asks for it.

        Args:
            fresh: indices of the modules that have no trained weights.
            trunk: the trunk, with its weights.
            head: the trunk's head, with its weights.
            text: its states over some text; None for ``mtp.init=random``.
        """

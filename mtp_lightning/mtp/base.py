"""The interface of a stack, which predicts several tokens.

Depth 0 is the next token, the trunk's own prediction; depths 1 .. D are the stack's. Most stacks
are of one of the kinds in ``kinds.py``. A stack is built by its config (``config.py``).

Shapes: B batch, T positions, C d_model, D depths.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_modules.windows import IGNORE_INDEX, RandomKey, WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.config import MTPConfig
from mtp_lightning.mtp.feed import Feed, HeadWeight, OwnLoss, Together
from mtp_lightning.mtp.inputs import StackInputs, TrunkText
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.trunk import Trunk, TrunkOutput

if TYPE_CHECKING:
    from mtp_lightning.mtp.own_head import OwnHead
    from mtp_lightning.mtp.rescoring import Rescorer


class MTPStack(nn.Module, ABC):
    """A stack on a trunk: it turns the trunk's state at the branch point into one hidden state per
    depth.

    A ``Chain`` or ``SideBySide`` (``kinds.py``) defines ``step``, another stack
    :meth:`depth_state`. All else has a default.

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
    # Whether depths are trained one after another, each with its backward pass in the forward pass
    # of the whole stack.
    trains_in_forward: ClassVar[bool] = False
    # Whether a depth is computed from the one before it.
    chained: ClassVar[bool] = False
    # Whether the module of depth 1 computes any depth, so that it drafts any number of tokens.
    repeats: bool = False
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
        self, trunk: Trunk, embedded_BTC: Tensor, ctx: ForwardContext, key: RandomKey | None
    ) -> tuple[Tensor, Tensor]:
        """The trunk's final state [B, T, C] over whole windows, and the one that the stack starts
        from, as :meth:`branch`. ``key`` is of the random choices in training, None for none."""
        output = trunk(embedded_BTC, ctx)
        return output.final, self.branch(trunk, output)

    def branch(self, trunk: Trunk, output: TrunkOutput) -> Tensor:
        """The trunk's hidden state [B, T, C] that the stack starts from; if ``config.n_states`` is
        above 1, that many states side by side."""
        hidden = trunk.state(output, self.config.branch, self.config.input_norm)
        # Detach once, before the loop over depths: detached at every depth, the earlier modules
        # would learn only from their own loss.
        return hidden if self.config.detach == "none" else hidden.detach()

    def main_state(self, final_BTC: Tensor) -> Tensor:
        """The head's input for the main prediction, from the trunk's output [..., C]."""
        return final_BTC

    # Hidden states of the depths.
    def depth_state(self, k: int, inputs: StackInputs, previous_BTC: Tensor) -> Tensor:
        """The hidden state of depth ``k``, [B, T, C], over whole windows or at the newest positions
        of decoding: the state that the next depth reads. By default the branch itself.

        Args:
            inputs: they hold the tokens of :meth:`reads`.
            previous_BTC: the hidden state of depth ``k - 1`` if depths are chained; for depth 1,
                and if not, the branch.
        """
        return inputs.branch

    def reads(self, k: int) -> range:
        """How far ahead of a position depth ``k`` reads true tokens (teacher forcing); the empty
        ``range(k, k)`` for none."""
        return range(k, k)

    def ahead(self, k: int) -> int:
        """How far ahead the newest token of :meth:`reads` is; 0 for none."""
        return max(self.reads(k).stop - 1, 0) if self.reads(k) else 0

    @property
    def reads_tokens(self) -> bool:
        """Whether a depth reads true tokens. If not, depth k predicts k tokens beyond the next
        without the tokens between."""
        return self.rescorer is not None or any(map(self.reads, range(1, self.depth + 1)))

    def state_width(self, d_model: int) -> int:
        """Width of a depth's hidden state."""
        return d_model

    def head_input(self, hidden: Tensor) -> Tensor:
        """The head's input for a depth, from its :meth:`depth_state` [..., C]."""
        return hidden

    def states(self, inputs: StackInputs, active: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The ``active`` depths over whole windows, in order: (k, [B, T, C]) ready for the head.

        A generator: a depth that no other depth reads is released when the next one is asked for.
        """
        previous = inputs.branch
        for k in self.with_prerequisites(active):
            version = None if previous.is_inference() else previous._version
            hidden = self.depth_state(k, inputs, previous)
            if version is not None and version != previous._version:
                raise UserError(
                    f"depth {k} of mtp={self.config.variant} changes the state that it reads in "
                    f"place, and depth {k - 1} is predicted from it: return a new tensor."
                )
            if self.chained:
                previous = hidden
            if k in active:
                yield k, self._checked(k, self.head_input(hidden), inputs)
            del hidden

    def _checked(self, k: int, hidden: Tensor, inputs: StackInputs) -> Tensor:
        """The head's input of depth ``k``, refused if it is not a state of every target."""
        shape = list(getattr(hidden, "shape", ()))
        shared = [self.state_width(inputs.embedded.shape[-1])]
        needed = [*inputs.branch.shape[:-1], *(shared if self.own_head is None else shape[-1:])]
        if shape != needed:
            raise UserError(
                f"depth {k} of mtp={self.config.variant} gives {shape or type(hidden).__name__}, "
                f"and a tensor of the shape [B, T, C] = {needed} is needed."
            )
        return hidden

    def with_prerequisites(self, active: Sequence[int]) -> list[int]:
        """The ``active`` depths and those that they are computed from, in order."""
        return list(range(1, max(active, default=0) + 1)) if self.chained else sorted(active)

    # Training targets.
    def tokens_read(self, tokens_BW: Tensor, scored_BW: Tensor | None) -> Tensor:
        """The tokens that trunk and depths read instead of the batch's, over whole windows, W = T +
        D + 1. ``scored_BW`` says which of them may be targets; None for all."""
        return tokens_BW

    def targets(self, k: int, batch: WindowBatch) -> Tensor:
        """The targets of depth ``k``, [B, T], as rows of its head: token ids for the shared one;
        -100 where none counts. Depth 0 is the main prediction. In a batch without a mask every
        position has a target; a stack without one there overrides :meth:`valid` too."""
        tokens_BT = batch.targets(k)
        return tokens_BT if not k or self.own_head is None else self.own_head.rows_of(tokens_BT)

    def valid(self, k: int, batch: WindowBatch) -> Tensor | None:
        """Which positions count for depth ``k``, bool [B, T]; None for all."""
        if k and (loss := self.own_loss(k, batch)) is not None:
            return loss.valid_BT
        every_token = not k or self.own_head is None or self.own_head.is_whole
        if batch.every_target_counts and every_token:  # known without reading tensors
            return None
        return self.targets(k, batch) != IGNORE_INDEX

    def own_loss(self, k: int, batch: WindowBatch) -> OwnLoss | None:
        """The loss of depth ``k`` over some windows, used instead of the objective's; None for
        stacks without ``config.brings_loss``."""
        return None

    # The stack's own head, and how it is trained.
    @property
    def own_head(self) -> OwnHead | None:
        """The head that projects the depths' hidden states; None for the shared head."""
        return None

    def feed(
        self, final_BTC: Tensor, inputs: StackInputs, batch: WindowBatch, depths: Sequence[int]
    ) -> Feed:
        """How the stack is trained on a micro-batch: which states go through the head, in which
        order. ``final_BTC`` is the trunk's output; ``depths`` are trained, in order."""
        losses = {k: loss for k in depths if (loss := self.own_loss(k, batch)) is not None}
        states, head = list(self.states(inputs, depths)), self.own_head
        if head is None:
            return Together(final_BTC, states, losses)
        tokens_N = None if head.is_whole else head.tokens
        return Together(final_BTC, states, losses, HeadWeight(head.weight, tokens_N=tokens_N))

    # Drafting.
    def rescore(self, k: int, hidden: Tensor, logits: Tensor, before: Tensor) -> Tensor:
        """The logits [..., V] that drafts of depth ``k`` are chosen by, from the head's; arguments
        as of :meth:`Rescorer.forward`."""
        return logits if self.rescorer is None else self.rescorer(k, hidden, logits, before)

    @property
    def appended(self) -> int:
        """How many positions the stack appends to a text to get its branch state in decoding, at
        most; 0 for stacks that start from the trunk's own states."""
        return 0

    def append(self, trunk: Trunk, ctx: ForwardContext) -> Tensor:
        """The branch state [B, 1, ..] of the newest token read, from a pass of the trunk over the
        positions after it: :attr:`appended` or fewer, which ``ctx`` has open in the trunk's cache.
        The cache keeps nothing of that pass."""
        raise NotImplementedError

    @property
    def block_width(self) -> int:
        """How many positions after a text one pass of the stack covers, from which all depths
        draft: its newest token, and D places for drafts. 0 for stacks whose depths have a pass
        each."""
        return 0

    def read(self, branch_BTC: Tensor, ctx: ForwardContext) -> None:
        """Write the entries of positions of the text to the cache in ``ctx``; for stacks with a
        :attr:`block_width`."""
        raise NotImplementedError

    def draft_block(self, embedded_B1C: Tensor, ctx: ForwardContext) -> Tensor:
        """The states of all depths [B, D, C], from the embedding of the newest token of the text;
        ``ctx`` has :attr:`block_width` positions open. For stacks with one."""
        raise NotImplementedError

    def corrected(self, k: int, hidden: Tensor, before: Tensor) -> Tensor:
        """The states [.., C] of depth ``k`` that drafts come from, of a :meth:`draft_block`, given
        the ids [..] of the tokens before the drafts."""
        return hidden

    def draft_obstacle(self) -> str:
        """Why the stack cannot draft, and the remedy, as a sentence; empty if it can."""
        advice = "leave out draft_depth, draft_vocab and tree"
        return "" if self.depth else f"this model has no MTP depth to draft with: {advice}."

    def require_drafts(self) -> None:
        """Raise a ``UserError`` with the :meth:`draft_obstacle`, if there is one."""
        if reason := self.draft_obstacle():
            raise UserError(reason)

    @property
    def max_draft_depth(self) -> int | None:
        """The most tokens that decoding can draft per round; None for any number."""
        if self.draft_obstacle():
            return 0
        return None if self.repeats else self.depth

    @property
    def is_recursive(self) -> bool:
        """Whether a single module with a cache reads its own output, so that all its drafts can use
        one cache."""
        return self.cached_blocks > 0 and self.max_draft_depth is None

    # Initialization.
    def observe_training_text(self, data: Any) -> None:
        """Read statistics that the loss needs, before the first step, from the ``training_text`` of
        a data module. Counting its ids takes a pass over the text.

        Raises:
            UserError: a task has no such text.
        """

    def init_from_trunk(
        self, fresh: Collection[int], trunk: Trunk, head: Head, text: TrunkText | None
    ) -> None:
        """Initialize new modules from a trained trunk, where ``mtp.init`` asks for it.

        Args:
            fresh: indices of the modules that have no trained weights.
            text: the trunk's states over some text; None for ``mtp.init=random``.
        """


class Confidence(nn.Module):
    """Estimates whether a depth's draft will be accepted (DSpark, arXiv 2607.05147): one linear
    layer per depth, from its hidden state to the logit of acceptance."""

    def __init__(self, depth: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, d_model))
        self.bias = nn.Parameter(torch.empty(depth))

    def forward(self, k: int, hidden: Tensor) -> Tensor:
        """The logits [...] of depth ``k`` for states [..., C]; a depth beyond D uses layer D."""
        row = slice(min(k, len(self.bias)) - 1, min(k, len(self.bias)))
        weight, bias = self.weight[row].to(hidden.dtype), self.bias[row].to(hidden.dtype)
        return F.linear(hidden, weight, bias)[..., 0]

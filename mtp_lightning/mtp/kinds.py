"""The three kinds of stack, by what a depth reads.

======================  ==========================================  =======================
kind                    depth k at position i reads                 variants
======================  ==========================================  =======================
:class:`Chain`          depth k - 1 and the true token i + k        sequential, nextlat,
                                                                    eagle
:class:`SideBySide`     the branch point, and with a correction     parallel, linear
                        true tokens up to i + k
:class:`Targets`        nothing: it is the main prediction          parameter_free, none,
                                                                    teacherless
======================  ==========================================  =======================

The others are of no kind. ``joint``, ``masked`` and ``linear`` with ``mtp.rank`` above 1 compute
all depths in one pass; ``top``, ``bag`` and ``registers`` train the trunk without drafting
(``summary.py``, ``training_only.py``).

Shapes: B batch, T positions, C d_model, D depths.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPConfig, MTPStack
from mtp_lightning.mtp.feed import Feed, LossRequest, OneState, Prediction, ThroughHead, added
from mtp_lightning.mtp.inputs import BranchPoint, FeedInputs, RandomKey
from mtp_lightning.mtp.rescoring import Rescorer
from mtp_lightning.mtp.switches import Branch, Detach
from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.auxiliary import AuxiliaryOutputs

if TYPE_CHECKING:
    from mtp_lightning.mtp.correction import Correction


class Chain(MTPStack):
    """Each depth reads the depth before it and one more true token.

    So decoding recomputes the cache entries and states that depend on a rejected draft.
    """

    chained: ClassVar[bool] = True
    reads_ahead = True

    @abstractmethod
    def step(
        self, k: int, previous_BTC: Tensor, embedded_BTC: Tensor, positions: Positions
    ) -> Tensor:
        """Hidden state [B, T, C] of depth ``k``, from that of depth ``k - 1`` (for depth 1, the
        branch) and from its token input."""

    def input_of(self, k: int, history: Sequence[Tensor], key: RandomKey | None) -> Tensor:
        """The hidden state [B, T, C] that depth ``k`` starts from over whole windows.

        Args:
            k: the depth.
            history: the branch, and the hidden states of the depths computed so far.
            key: key of the random choices in training; None for no random choices.
        """
        return history[-1]

    def tokens_of(self, k: int, embedded_BTC: Tensor, key: RandomKey | None) -> Tensor:
        """The token input [B, T, C] of depth ``k``.

        Args:
            k: the depth.
            embedded_BTC: embeddings of the true tokens ``k`` positions ahead.
            key: key of the random choices in training; None for no random choices.
        """
        return embedded_BTC.detach() if self.config.detach == "all" else embedded_BTC

    def states(
        self, at: BranchPoint, active: Sequence[int], key: RandomKey | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        history = [at.hidden]
        for k in self.with_prerequisites(active):
            previous = self.input_of(k, history, key)
            tokens = self.tokens_of(k, at.embedded_at(k), key)
            history.append(self.step(k, previous, tokens, at.positions))
            if k in active:
                yield k, history[-1]

    def depth_state(self, k: int, at: BranchPoint, previous_BTC: Tensor) -> Tensor:
        tokens = self.tokens_of(k, at.embedded_at(k), None)
        return self.step(k, previous_BTC, tokens, at.positions)


class SideBySide(MTPStack):
    """D heads that are computed and trained independently of each other.

    Args:
        config: the variant's.
        heads: one per depth.
        corrections: one per depth, added to the heads' hidden states; empty for heads that read no
            token.
        rescorer: changes the logits of all depths by the token before; None for none.
    """

    in_turn: ClassVar[bool] = True

    def __init__(
        self,
        config: MTPConfig,
        heads: Sequence[nn.Module],
        corrections: Sequence[Correction] = (),
        rescorer: Rescorer | None = None,
    ) -> None:
        super().__init__(config)
        self.rescorer = rescorer
        self.depths = nn.ModuleList(heads)
        self.corrections = nn.ModuleList(corrections)
        self.reads_ahead = len(corrections) > 0

    @abstractmethod
    def step(self, k: int, branch_BTC: Tensor, positions: Positions) -> Tensor:
        """The output of head ``k`` [B, T, C]. :meth:`states` and :meth:`depth_state` add the
        correction, which gives the depth's hidden state."""

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """The parameters of depth ``k``."""
        modules = (self.depths, self.corrections) if self.corrections else (self.depths,)
        return [p for of_depths in modules for p in of_depths[k - 1].parameters()]

    def reset_own_weights(self) -> None:
        for correction in cast("list[Correction]", list(self.corrections)):
            correction.reset_own_weights()
        if self.rescorer is not None:
            self.rescorer.reset_own_weights()

    def depth_state(self, k: int, at: BranchPoint, previous_BTC: Tensor) -> Tensor:
        hidden = self.step(k, at.hidden, at.positions)
        if not self.corrections:
            return hidden
        if self.config.detach == "all":
            at = replace(at, embedded=at.embedded.detach())
        return hidden + self.corrections[k - 1](k, at)

    def feed(self, inputs: FeedInputs) -> Feed:
        # The variants here use the shared head; heads of yours with their own are trained together.
        return HeadByHead(self, inputs) if self.own_head is None else super().feed(inputs)

    def first_token(self, k: int) -> int:
        return 1 if self.corrections else k

    @property
    def max_draft_depth(self) -> int | None:
        return self.depth if self.config.stride == 1 else 0

    def require_drafts(self) -> None:
        if self.config.stride > 1:
            raise UserError(
                f"a model of mtp.stride={self.config.stride} predicts one token in "
                f"{self.config.stride} and leaves those between out, so it cannot draft: "
                "decode it without drafts, or train one with mtp.stride=1."
            )
        super().require_drafts()


class HeadByHead(Feed):
    """Heads side by side in Gloeckle's memory order (Gloeckle et al. 2024, section 2, fig. 2).

    Each head in turn runs forward, through the loss, and backward; its activations are freed before
    the next one starts. The gradients add up at the branch point, from where one backward pass goes
    through the trunk. Peak memory holds the activations of the trunk and of one head, for any D.
    """

    def __init__(self, stack: SideBySide, inputs: FeedInputs) -> None:
        self.stack, self.key, self.at, self.depths = stack, inputs.key, inputs.at, inputs.depths
        # Inputs that the heads share: the branch state and, if they read tokens, the embeddings.
        self.common = [self.at.hidden]
        if stack.reads_ahead and self.depths:
            self.common.append(self.at.embedded)
        used = [p for k in self.depths for p in stack.parameters_of(k)]
        super().__init__([inputs.final_BTC, *self.common, *used])

    def states(self) -> Iterator[Sequence[tuple[int, Tensor]]]:
        # A second forward pass of each head, which reports no router loads: input_gradients() does.
        silent = replace(self.at, positions=replace(self.at.positions, auxiliary=None))
        for state in self.stack.states(silent, self.depths, self.key):
            yield [state]

    def input_gradients(
        self, request: LossRequest, through_head: ThroughHead
    ) -> Sequence[Tensor | None]:
        main = Prediction(self.main, request.targets[0], needs_gradient=request.needs[0])
        through_head([main])
        of_common: list[Tensor | None] = [None] * len(self.common)
        of_heads: list[Tensor | None] = []
        for k in self.depths:
            d_common, d_own = self._one_head(k, request, through_head)
            of_heads += d_own
            of_common = [added(pair) for pair in zip(of_common, d_common, strict=True)]
        return [main.gradient, *of_common, *of_heads]

    def _one_head(
        self, k: int, request: LossRequest, through_head: ThroughHead
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """One head forward, through the loss, and backward; its activations end with this call.

        Returns:
            The gradients of the shared inputs, and those of the head's own parameters.
        """
        own = self.stack.parameters_of(k)
        outer = self.at.positions.auxiliary
        reported = None if outer is None else AuxiliaryOutputs()
        with torch.set_grad_enabled(any(request.needs)):
            leaves = [
                tensor.detach().requires_grad_(wanted)
                for tensor, wanted in zip(self.common, request.needs[1:], strict=False)
            ]
            at = replace(
                self.at, hidden=leaves[0], positions=replace(self.at.positions, auxiliary=reported)
            )
            if len(leaves) > 1:
                at = replace(at, embedded=leaves[1])
            ((_, hidden),) = self.stack.states(at, [k], self.key)
        prediction = Prediction(
            hidden,
            request.targets[k],
            train_head=request.train_head,
            needs_gradient=hidden.requires_grad,
        )
        through_head([prediction])
        auxiliary: list[Tensor] = []
        if outer is not None and reported is not None:
            auxiliary = reported.losses
            outer.add(reported)  # detached: their backward pass is the one below
        if prediction.gradient is None:
            return [None] * len(leaves), [None] * len(own)
        needing = [leaf for leaf in leaves if leaf.requires_grad]
        # The balance losses of the head's own experts share this backward pass.
        grads = torch.autograd.grad(
            [hidden, *auxiliary],
            [*needing, *own],
            [
                prediction.gradient,
                *(torch.full_like(loss, request.auxiliary) for loss in auxiliary),
            ],
            allow_unused=True,
        )
        of_common = iter(grads)
        d_common = [next(of_common) if leaf.requires_grad else None for leaf in leaves]
        return d_common, list(grads[len(needing) :])


@dataclass(frozen=True, kw_only=True)
class OneModuleConfig(MTPConfig):
    """Switches of a single module for all depths (``nextlat``, ``joint``).

    It has no norm before the shared head, so it always reads a state after the trunk's final norm.

    Attributes:
        branch: ``final`` reads the whole trunk; ``before_last`` all blocks except the last.
        detach: ``trunk`` stops the depths' gradients at the branch point, once, before the first
            depth; ``all`` also at the shared embedding and head.
        freeze_trunk: embedding, trunk and head keep their weights; only the module is trained.
    """

    meaning: ClassVar[tuple[str, ...]] = ("branch",)

    branch: Branch = "final"
    detach: Detach = "none"
    freeze_trunk: bool = False


class Targets(MTPStack):
    """A stack without modules: every depth is the main prediction, with a target further ahead."""

    def feed(self, inputs: FeedInputs) -> Feed:
        return OneState(inputs.final_BTC, inputs.depths)

    def depth_state(self, k: int, at: BranchPoint, previous_BTC: Tensor) -> Tensor:
        return at.hidden

    @property
    def max_draft_depth(self) -> int | None:
        return 0

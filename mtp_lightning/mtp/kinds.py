"""The kinds of stack, by what a depth reads.

======================  ==========================================  =======================
kind                    depth k at position i reads                 variants
======================  ==========================================  =======================
:class:`Chain`          depth k - 1 and the true token i + k        sequential, nextlat,
                                                                    eagle
:class:`SideBySide`     the branch point, and with a correction     parallel, linear
                        true tokens up to i + k
:class:`NoModules`      nothing: it is the main prediction          parameter_free, none,
                                                                    teacherless
:class:`TrainingOnly`   the branch point; it predicts no token and  top, bag, registers
                        shapes the trunk in training alone
======================  ==========================================  =======================

The others are of no kind: ``joint``, ``masked`` and ``dflash`` compute all depths in one pass, and
``linear`` with ``mtp.rank`` above 1 is a chain of mixtures.

Shapes: B batch, T positions, C d_model, D depths.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from data_modules.windows import WindowBatch
from mtp_lightning.mtp.base import MTPConfig, MTPStack
from mtp_lightning.mtp.feed import Feed, LossRequest, OneState, Prediction, ThroughHead, added
from mtp_lightning.mtp.inputs import StackInputs
from mtp_lightning.nn.auxiliary import AuxiliaryOutputs
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.settings import require_whole

if TYPE_CHECKING:
    from mtp_lightning.mtp.correction import Correction
    from mtp_lightning.mtp.rescoring import Rescorer


class Chain(MTPStack):
    """Each depth reads the depth before it and one more true token.

    So decoding recomputes the cache entries and states that depend on a rejected draft.
    """

    chained: ClassVar[bool] = True

    def reads(self, k: int) -> range:
        return range(k, k + 1)

    @abstractmethod
    def step(
        self, k: int, previous_BTC: Tensor, embedded_BTC: Tensor, ctx: ForwardContext
    ) -> Tensor:
        """Hidden state [B, T, C] of depth ``k``, from that of depth ``k - 1`` (for depth 1, the
        branch) and from its token input."""

    def token_input(self, k: int, inputs: StackInputs) -> Tensor:
        """The token input [B, T, C] of depth ``k``: by default the embeddings of the true tokens
        ``k`` positions ahead."""
        embedded_BTC = inputs.embedded_at(k)
        return embedded_BTC.detach() if self.config.detach == "all" else embedded_BTC

    def depth_state(self, k: int, inputs: StackInputs, previous_BTC: Tensor) -> Tensor:
        return self.step(k, previous_BTC, self.token_input(k, inputs), inputs.ctx)


class SideBySide(MTPStack):
    """D heads that are computed and trained independently of each other.

    Args:
        heads: one per depth.
        corrections: one per depth, added to the heads' hidden states; empty for heads that read no
            token.
        rescorer: see :class:`MTPStack`.
    """

    trains_in_forward: ClassVar[bool] = True

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

    @abstractmethod
    def step(self, k: int, branch_BTC: Tensor, ctx: ForwardContext) -> Tensor:
        """The output of head ``k`` [B, T, C]. :meth:`depth_state` adds the correction, which gives
        the depth's hidden state."""

    def reads(self, k: int) -> range:
        return range(1, k + 1) if self.corrections else super().reads(k)

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """The parameters that learn with depth ``k``: its own, and those that the depths share."""
        lists = (self.depths, self.corrections) if self.corrections else (self.depths,)
        own = [p for by_depth in lists for p in by_depth[k - 1].parameters()]
        apart = {self.depths, self.corrections, self.rescorer, self.confidence}
        shared = [
            p for module in self.children() if module not in apart for p in module.parameters()
        ]
        # Once each: a layer may be an attribute of the stack and its head, too.
        parameters = dict.fromkeys((*own, *shared, *self.parameters(recurse=False)))
        return [p for p in parameters if p.requires_grad]

    def depth_state(self, k: int, inputs: StackInputs, previous_BTC: Tensor) -> Tensor:
        hidden = self.step(k, inputs.branch, inputs.ctx)
        if not self.corrections:
            return hidden
        if self.config.detach == "all":
            inputs = replace(inputs, embedded=inputs.embedded.detach())
        return hidden + self.corrections[k - 1](k, inputs)

    def feed(
        self, final_BTC: Tensor, inputs: StackInputs, batch: WindowBatch, depths: Sequence[int]
    ) -> Feed:
        # HeadByHead supports only the shared head. A subclass with its own head trains all depths
        # together.
        if self.own_head is not None:
            return super().feed(final_BTC, inputs, batch, depths)
        return HeadByHead(self, final_BTC, inputs, depths)

    def draft_obstacle(self) -> str:
        if self.config.stride == 1:
            return super().draft_obstacle()
        return (
            f"a model of mtp.stride={self.config.stride} predicts one token in "
            f"{self.config.stride} and leaves those between out, so it cannot draft: "
            "decode it without drafts, or train one with mtp.stride=1."
        )


class NoModules(MTPStack):
    """A stack without modules: every depth is the main prediction, with a target further ahead."""

    def feed(
        self, final_BTC: Tensor, inputs: StackInputs, batch: WindowBatch, depths: Sequence[int]
    ) -> Feed:
        return OneState(final_BTC, depths)

    def draft_obstacle(self) -> str:
        return super().draft_obstacle() or (
            f"mtp={self.config.variant} trains the next token's own logits on further targets and "
            "has no module to draft with: decode it without drafts, or train another mtp variant."
        )


@dataclass(frozen=True, kw_only=True)
class TrainingOnlyConfig(MTPConfig):
    """The config of a stack whose single depth shapes the trunk in training and is not used after.

    Attributes:
        lookahead: how many tokens ahead of a position the stack looks, at most.
    """

    fixed_depth: ClassVar[int] = 1
    predicts_tokens: ClassVar[bool] = False
    # How far ahead the nearest token is that the stack looks at: 1 is the next one.
    first_ahead: ClassVar[int] = 1

    depth: int = 1
    lookahead: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("mtp.lookahead", self.lookahead, least=self.first_ahead)

    @property
    def places_ahead(self) -> int:
        return self.lookahead


class TrainingOnly(MTPStack):
    """A stack that has nothing to draft with, and no agreement."""

    config: TrainingOnlyConfig

    def draft_obstacle(self) -> str:
        return (
            f"mtp={self.config.variant} shapes the trunk in training and has nothing to draft "
            "with: decode it without drafts, or train another mtp variant."
        )


class HeadByHead(Feed):
    """Heads side by side in Gloeckle's memory order (Gloeckle et al. 2024, section 2, fig. 2).

    Each head in turn runs forward, through the loss, and backward; its activations are freed before
    the next one starts. The gradients add up at the branch point, from where one backward pass goes
    through the trunk. Peak memory holds the activations of the trunk and of one head, for any D.
    """

    def __init__(
        self, stack: SideBySide, final_BTC: Tensor, stack_inputs: StackInputs, depths: Sequence[int]
    ) -> None:
        self.stack, self.stack_inputs, self.depths = stack, stack_inputs, depths
        # Inputs that the heads share: the branch state and, if they read tokens, the embeddings.
        self.common = {"branch": stack_inputs.branch}
        if any(map(stack.reads, depths)):
            self.common["embedded"] = stack_inputs.embedded
        parameters = [p for k in depths for p in stack.parameters_of(k)]
        super().__init__([final_BTC, *self.common.values(), *parameters])

    def state_groups(self) -> Iterator[Sequence[tuple[int, Tensor]]]:
        # A second forward pass of each head, which reports no router loads: input_gradients() does.
        silent = replace(self.stack_inputs, ctx=replace(self.stack_inputs.ctx, auxiliary=None))
        for state in self.stack.states(silent, self.depths):
            yield [state]

    def input_gradients(self, request: LossRequest, send: ThroughHead) -> Sequence[Tensor | None]:
        main = Prediction(self.main, request.targets[0], needs_gradient=request.needs[0])
        send([main])
        d_common: list[Tensor | None] = [None] * len(self.common)
        d_heads: list[Tensor | None] = []
        for k in self.depths:
            d_common_k, d_head = self._one_head(k, request, send)
            d_heads += d_head
            d_common = [added(pair) for pair in zip(d_common, d_common_k, strict=True)]
        return [main.gradient, *d_common, *d_heads]

    def _one_head(
        self, k: int, request: LossRequest, send: ThroughHead
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """One head forward, through the loss, and backward; its activations end with this call.

        Returns:
            The gradients of the shared inputs, and those of the head's own parameters.
        """
        parameters, ctx = self.stack.parameters_of(k), self.stack_inputs.ctx
        auxiliary = None if ctx.auxiliary is None else AuxiliaryOutputs()
        with torch.set_grad_enabled(any(request.needs)):
            needs = zip(self.common.items(), request.needs[1:], strict=False)
            leaves: dict[str, Any] = {
                name: tensor.detach().requires_grad_(needed) for (name, tensor), needed in needs
            }
            own_inputs = replace(self.stack_inputs, **leaves, ctx=replace(ctx, auxiliary=auxiliary))
            ((_, hidden),) = self.stack.states(own_inputs, [k])
        prediction = Prediction(
            hidden,
            request.targets[k],
            train_head=request.train_head,
            needs_gradient=hidden.requires_grad,
        )
        send([prediction])
        losses: list[Tensor] = []
        if ctx.auxiliary is not None and auxiliary is not None:
            losses = [loss for loss in auxiliary.losses if loss.requires_grad]
            ctx.auxiliary.add(auxiliary)  # detached: their backward pass is the one below
        if prediction.gradient is None:
            return [None] * len(leaves), [None] * len(parameters)
        inputs = [*(leaf for leaf in leaves.values() if leaf.requires_grad), *parameters]
        # The balance losses of the head's own experts share this backward pass.
        loss_factors = [torch.full_like(loss, request.auxiliary_factor) for loss in losses]
        gradients = torch.autograd.grad(
            [hidden, *losses], inputs, [prediction.gradient, *loss_factors], allow_unused=True
        )
        by_input = dict(zip(inputs, gradients, strict=True))
        return [by_input.get(leaf) for leaf in leaves.values()], [by_input[p] for p in parameters]

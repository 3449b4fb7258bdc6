"""The model: trunk, shared head and MTP stack, without losses or training.

Shapes: B batch, T positions, C d_model, D depths, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from data_modules.windows import WindowBatch
from mtp_lightning import parts
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import Confidence, MTPConfig, MTPStack
from mtp_lightning.mtp.inputs import StackInputs
from mtp_lightning.nn.auxiliary import AuxiliaryOutputs
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.init import initialize
from mtp_lightning.nn.trunk import Trunk
from mtp_lightning.registry import is_own


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The configs of trunk and stack, from which a checkpoint rebuilds its model."""

    trunk: TrunkConfig
    mtp: MTPConfig

    def on_meta(self) -> MTPModel:
        """The model in training mode on PyTorch's ``meta`` device: modules and shapes without
        values, which take no memory.

        Raises:
            UserError: a tensor has more elements than PyTorch can count.
        """
        try:
            with torch.device("meta"):
                return MTPModel(self)
        except (RuntimeError, TypeError) as error:
            if "overflow" not in str(error).lower():
                raise
            raise UserError(
                f"a model of model.d_model={self.trunk.d_model} and model.vocab_size="
                f"{self.trunk.vocab_size} has a tensor too large to count: make it smaller."
            ) from error

    def num_params(self) -> int:
        """All parameters; tied ones count once."""
        return self._param_counts[0]

    def num_active_params(self) -> int:
        """Parameters that one token uses: without the experts that it is not sent to, and without
        the embedding if it is only a lookup table."""
        return self._param_counts[1]

    def num_trunk_params(self) -> int:
        """Parameters of embedding, blocks, final norm and head."""
        return self._param_counts[2]

    @cached_property
    def _param_counts(self) -> tuple[int, int, int]:
        model = self.on_meta()
        total, stack = n_weights(model), n_weights(model.mtp)
        idle = sum(getattr(x, "idle_params", lambda: 0)() for x in model.modules())
        lookup_table = 0 if self.trunk.tie_embeddings else n_weights(model.trunk.embedding)
        return total, total - idle - lookup_table, total - stack

    def packages(self) -> list[str]:
        """The other packages whose variants the model has, which ``allow`` must name."""
        variants = map(type, (self.mtp, self.trunk.attention, self.trunk.feed_forward))
        return sorted({v.__module__.partition(".")[0] for v in variants if not is_own(v)})

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        return {"trunk": self.trunk.to_dict(), "mtp": self.mtp.to_dict()}

    @staticmethod
    def from_dict(data: dict[str, Any], *, allow: Collection[str] = ()) -> ModelConfig:
        """The inverse of :meth:`to_dict`; variants may be imported from the packages in ``allow``.

        Raises:
            UserError: a variant or field is unknown, or a package is not allowed.
        """
        return ModelConfig(
            trunk=TrunkConfig.from_dict(data["trunk"], allow=allow),
            mtp=MTPConfig.from_dict(data["mtp"], allow=allow),
        )


def n_weights(module: nn.Module) -> int:
    """The number of weights in a module; shared ones count once."""
    return sum(weight.numel() for weight in module.parameters())


class MTPModel(nn.Module):
    """The trunk, the output head that every depth shares, and the stack ``mtp`` of further
    predictions; ``compiled`` is whether its blocks are compiled. The weights have no values before
    :meth:`initialize` or ``load_state_dict``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        parts.load_cpu()
        self.config = config
        self.compiled = False
        self.trunk = Trunk(config.trunk)
        embedding: nn.Parameter = self.trunk.embedding.weight  # type: ignore[assignment]
        tied = embedding if config.trunk.tie_embeddings else None
        self.head = Head(config.trunk.vocab_size, config.trunk.d_model, tied=tied)
        self.mtp = config.mtp.build(config.trunk)
        if not isinstance(self.mtp, MTPStack):
            raise UserError(
                f"{type(config.mtp).__name__}.build gives {type(self.mtp).__name__}: return the "
                "MTPStack that it builds."
            )
        self.trunk.keep_after = self.mtp.blocks_kept
        if config.mtp.confidence and config.mtp.depth:
            self.mtp.confidence = Confidence(config.mtp.depth, config.trunk.d_model)
        if not config.mtp.trains_trunk:
            self.trunk.requires_grad_(False)
            self.head.requires_grad_(False)
        _require_registered(self)

    @property
    def depth(self) -> int:
        """D."""
        return self.config.mtp.depth

    @property
    def token_depth(self) -> int:
        """Number of depths that predict one token each: D, or 0 for other kinds of stacks."""
        return self.depth if self.config.mtp.predicts_tokens else 0

    def head_of(self, k: int) -> Head:
        """The head that projects the hidden states of depth ``k``."""
        head = self.mtp.own_head if k else None
        return self.head if head is None else head

    def forward(self, batch: WindowBatch, active: Sequence[int] | None = None) -> dict[int, Tensor]:
        """Hidden states of depth 0 and of the ``active`` MTP depths, by default all, ready for the
        head. Only what they need is computed.

        Returns:
            Depth -> [B, T, C], in the order of depths. Depth k at position i predicts token
            ``i + k + 1`` of the window.

        Raises:
            UserError: the batch was built for another depth.
        """
        active = range(1, self.depth + 1) if active is None else active
        final_BTC, inputs = self.run_trunk(batch, active)
        return {0: self.mtp.main_state(final_BTC), **dict(self.mtp.states(inputs, active))}

    def run_trunk(
        self,
        batch: WindowBatch,
        active: Sequence[int],
        *,
        auxiliary: AuxiliaryOutputs | None = None,
    ) -> tuple[Tensor, StackInputs]:
        """The trunk over whole windows, or its states that are stored in the batch.

        ``active`` are the depths that will be computed; ``auxiliary`` collects the outputs of the
        trunk and, through the inputs, of the stack.

        Returns:
            The trunk's output [B, T, C], which the head projects, and the inputs of the stack.

        Raises:
            UserError: the batch was built for another depth.
        """
        batch.require_depth(self.depth, self.config.mtp.stride)
        seq_len = batch.seq_len
        documents = None if batch.documents is None else batch.documents[:, :seq_len]
        ctx = ForwardContext.of_window(
            self.config.trunk,
            seq_len,
            device=batch.tokens.device,
            dtype=self.head.weight.dtype,
            documents=documents,
            in_blocks=self.has_compiled_kernels,
            auxiliary=auxiliary,
        )
        # One lookup for all depths, which read the same embeddings, shifted.
        tokens = self.mtp.tokens_read(batch.tokens, batch.scored)
        tokens = tokens[:, : seq_len + self.mtp.ahead(max(active, default=0))]
        embedded = self.trunk.embedding(tokens)
        read_BTC = embedded[:, :seq_len]
        if batch.states is not None:
            final, *states = (state.contiguous() for state in batch.states.unbind(1))
            states = states or [final]
            branch = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
        elif active:
            final, branch = self.mtp.through_trunk(self.trunk, read_BTC, ctx, batch.key)
        else:
            final = branch = self.trunk(read_BTC, ctx).final
        inputs = StackInputs(branch, tokens, embedded, ctx, head=self.head, key=batch.key)
        return final, inputs

    def depth_state(
        self,
        k: int,
        branch_BTC: Tensor,
        previous_BTC: Tensor,
        tokens: Tensor,
        ctx: ForwardContext,
        *,
        tokens_apart: int = 1,
    ) -> Tensor:
        """Hidden state of depth ``k`` at the newest positions of a text that is being decoded.

        Args:
            k: depth in 1 .. D, or any depth of a recursive stack.
            branch_BTC: trunk state that the stack starts from.
            previous_BTC: hidden state of depth ``k - 1``; for depth 1, the branch.
            tokens: ids [B, at least T]; the first stands ``mtp.reads(k).start`` positions ahead.
            ctx: of the T positions, with the cache of this depth.

        Returns:
            [B, T, C], which the next depth reads, and the head after ``mtp.head_input``.
        """
        inputs = StackInputs(
            branch=branch_BTC,
            tokens=tokens,
            embedded=self.trunk.embedding(tokens),
            ctx=ctx,
            first=self.mtp.reads(k).start,
            tokens_apart=tokens_apart,
            head=self.head,
        )
        return self.mtp.depth_state(k, inputs, previous_BTC)

    def draft_logits(self, k: int, hidden: Tensor, before: Tensor) -> Tensor:
        """The logits [..., V] that drafts of depth ``k`` >= 1 are chosen by, from the inputs of its
        head [..., C] and the ids [...] of the tokens before the drafts."""
        return self.mtp.rescore(k, hidden, self.head_of(k)(hidden), before)

    def initialize(self, seed: int) -> None:
        """Initialize all weights: at random, except those that a module sets by its
        ``reset_own_weights()``."""
        initialize(self, std=self.config.trunk.init_std, seed=seed)
        # Parts first: a module may change what they have set.
        for module in reversed([*self.modules()]):
            if callable(reset := getattr(module, "reset_own_weights", None)):
                reset()

    @property
    def has_compiled_kernels(self) -> bool:
        """Whether document attention and cross-entropy use compiled kernels too. On a CPU they do
        not: the compiler has no backward pass there, or no faster code."""
        return self.compiled and self.head.weight.device.type != "cpu"

    def compile_blocks(self) -> None:
        """Compile every block in place, which leaves the keys of checkpoints unchanged."""
        from torch._functorch import config

        self.compiled = True
        # A backward pass that reuses buffers of its graph runs once, and rules such as cosine_gate
        # run one per task.
        config.donated_buffer = False
        AuxiliaryOutputs.leave_uncompiled()
        for layer in self.modules():
            if isinstance(layer, Block):
                layer.compile()


def _require_registered(model: nn.Module) -> None:
    """Refuse layers that a Python container holds: PyTorch neither trains nor stores them."""
    known = {*model.modules(), *model.parameters()}
    for module in model.modules():
        for name, value in vars(module).items():
            if not isinstance(value, list | tuple | dict):
                continue
            for item in value.values() if isinstance(value, dict) else value:
                if isinstance(item, nn.Module | nn.Parameter) and item not in known:
                    raise UserError(
                        f"{type(module).__name__}.{name} is a {type(value).__name__} with layers, "
                        "which would be neither trained nor stored: use torch.nn.ModuleList, "
                        "ModuleDict, ParameterList or ParameterDict."
                    )

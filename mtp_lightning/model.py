"""The model: trunk, shared head and MTP stack. It knows nothing of losses or of training.

Shapes: B batch, T positions, C d_model, K depths, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from data_modules.windows import WindowBatch
from mtp_lightning import parts
from mtp_lightning.mtp.base import BranchPoint, MTPConfig, MTPStack, RandomKey, TrunkText
from mtp_lightning.mtp.confidence import Confidence
from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.init import initialise
from mtp_lightning.nn.ledger import Ledger
from mtp_lightning.nn.trunk import Trunk


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Trunk and stack together: what a checkpoint stores to build its model again."""

    trunk: TrunkConfig
    mtp: MTPConfig

    def num_params(self) -> int:
        """All weights, tied ones once."""
        return self.trunk.num_params() + self._stack_params()

    def num_active_params(self) -> int:
        """Those of them that one token goes through: all but the experts it is not sent to."""
        stack = self._stack_params() - self.mtp.num_idle_params(self.trunk)
        return self.trunk.num_active_params() + stack

    def _stack_params(self) -> int:
        confidence = self.mtp.depth * (self.trunk.d_model + 1) if self.mtp.confidence else 0
        return self.mtp.num_params(self.trunk) + confidence

    def forward_flops_per_token(self, seq_len: int, active: Sequence[int] | None = None) -> int:
        """FLOPs of a forward pass for one position, attention and heads included.

        Args:
            seq_len: T, since attention's share grows with it.
            active: the MTP depths computed; by default all.
        """
        if active is None:
            active = range(1, self.mtp.depth + 1)
        blocks = self.mtp.trunk_flops(self.trunk, seq_len, active)
        return blocks + self.trunk.head_flops() + self.mtp.flops(self.trunk, seq_len, active)

    def flops_per_token(self, seq_len: int, active: Sequence[int] | None = None) -> int:
        """FLOPs of training on one position: forward, and twice as much backward, without the
        gradients that nobody asks for.

        A frozen trunk has no backward pass, and its main prediction is not computed; the frozen
        head has the half of a backward pass that leads on to the modules. Nor does the head learn
        from the depths under ``mtp.detach=all``.
        """
        mtp, trunk = self.mtp, self.trunk
        if active is None:
            active = range(1, mtp.depth + 1)
        head = trunk.head_flops()
        forward = self.forward_flops_per_token(seq_len, active)
        backward = mtp.module_backward_flops(trunk, seq_len, active)
        backward += mtp.projections(active) * head
        if mtp.trains_trunk:
            backward += 2 * (mtp.trunk_flops(trunk, seq_len, active) + head)
            if mtp.detach != "all":
                backward += mtp.projections(active) * head
        else:
            forward -= head
        return forward + backward

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        return {"trunk": self.trunk.to_dict(), "mtp": self.mtp.to_dict()}

    @staticmethod
    def from_dict(data: dict[str, Any], *, allow: Collection[str] = ()) -> ModelConfig:
        """The inverse of :meth:`to_dict`.

        Args:
            data: from a checkpoint.
            allow: packages whose variants may be imported.

        Raises:
            UserError: an unknown variant or field, or a package that is not allowed.
        """
        return ModelConfig(
            trunk=TrunkConfig.from_dict(data["trunk"], allow=allow),
            mtp=MTPConfig.from_dict(data["mtp"], allow=allow),
        )


class MTPModel(nn.Module):
    """Trunk + head + stack.

    Attributes:
        trunk: embedding, blocks and final norm.
        head: the output head, shared by every depth.
        mtp: the stack of further predictions.
        compiled: whether its blocks are.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        parts.load()
        self.config = config
        self.compiled = False
        self.trunk = Trunk(config.trunk)
        embedding: nn.Parameter = self.trunk.embedding.weight  # type: ignore[assignment]
        tied = embedding if config.trunk.tie_embeddings else None
        self.head = Head(config.trunk.vocab_size, config.trunk.d_model, tied=tied)
        self.mtp: MTPStack = config.mtp.build(config.trunk)
        if config.mtp.confidence and config.mtp.depth:
            self.mtp.confidence = Confidence(config.mtp.depth, config.trunk.d_model)
        if not config.mtp.trains_trunk:
            self.trunk.requires_grad_(False)
            self.head.requires_grad_(False)

    @property
    def depth(self) -> int:
        """D."""
        return self.config.mtp.depth

    @property
    def token_depth(self) -> int:
        """Depths that predict a token each: D, or 0 of a stack that predicts something else."""
        return self.depth if self.config.mtp.predicts_tokens else 0

    def initialise(self, seed: int) -> None:
        """Draw all weights anew."""
        assert self.config.trunk.init_std is not None
        initialise(self, std=self.config.trunk.init_std, seed=seed)
        self.mtp.initialise_own()

    @property
    def has_compiled_kernels(self) -> bool:
        """Whether documents' attention and the loss are kernels of the compiler's, too; it makes
        none for a CPU's backward pass, or none that is faster."""
        return self.compiled and self.head.weight.device.type != "cpu"

    def compile_blocks(self) -> None:
        """Compile every block in place: the keys of checkpoints stay what they are."""
        self.compiled = True
        for layer in self.modules():
            if isinstance(layer, Block):
                layer.compile()

    @torch.no_grad()
    def read_text(self, batch: WindowBatch) -> TrunkText:
        """What the trunk makes of whole windows, for modules that begin on it."""
        seq_len, device = batch.seq_len, self.head.weight.device
        end = seq_len + self.depth
        documents = None if batch.documents is None else batch.documents[:, :end].to(device)

        def positions(n: int) -> Positions:
            return Positions.of_window(
                self.config.trunk,
                n,
                device=device,
                dtype=self.head.weight.dtype,
                documents=None if documents is None else documents[:, :n],
            )

        tokens = batch.tokens[:, :end].to(device)
        embedded = self.trunk.embedding(tokens)
        output = self.trunk(embedded, positions(end))
        hidden = self.mtp.branch(self.trunk, output)[:, :seq_len]
        at = BranchPoint(hidden, tokens, embedded, positions(seq_len))
        return TrunkText(at, output.before_last, documents)

    def forward(
        self,
        batch: WindowBatch,
        active: Sequence[int] | None = None,
        *,
        key: RandomKey | None = None,
    ) -> dict[int, Tensor]:
        """Hidden states of depth 0 and of the ``active`` MTP depths, ready for the head.

        Args:
            batch: windows built for this model's depth.
            active: depths in 1 .. D whose hidden states are wanted; by default all. What none
                of them needs is not computed.
            key: of a stack's random choices in training; None makes none.

        Returns:
            Depth -> [B, T, C], in the order of depths. Depth k at position i predicts token
            ``i + k + 1`` of the window.

        Raises:
            UserError: the batch was built for another depth.
        """
        active = range(1, self.depth + 1) if active is None else active
        final_BTC, at = self.run_trunk(batch, active, key=key)
        at = replace(at, head=self.head)
        main = self.mtp.main_state(final_BTC)
        return {0: main, **dict(self.mtp.states(at, active, key))}

    def run_trunk(
        self,
        batch: WindowBatch,
        active: Sequence[int],
        *,
        ledger: Ledger | None = None,
        key: RandomKey | None = None,
    ) -> tuple[Tensor, BranchPoint]:
        """The trunk over whole windows, or what the batch knows that it says.

        Args:
            batch: windows built for this model's depth.
            active: depths that are to start from it.
            ledger: where the layers report; that of the branch point is the same.
            key: of a stack's random choices in training; None makes none.

        Returns:
            The trunk's output [B, T, C], which the head projects, and where the stack starts.

        Raises:
            UserError: the batch was built for another depth.
        """
        batch.require_depth(self.depth, self.config.mtp.stride)
        seq_len = batch.seq_len
        documents = None if batch.documents is None else batch.documents[:, :seq_len]
        positions = Positions.of_window(
            self.config.trunk,
            seq_len,
            device=batch.tokens.device,
            dtype=self.head.weight.dtype,
            documents=documents,
            in_blocks=self.has_compiled_kernels,
            ledger=ledger,
        )
        # One look-up for all depths: theirs are the same embeddings, shifted.
        tokens = self.mtp.tokens_read(batch.tokens, batch.scored)
        tokens = tokens[:, : seq_len + self.mtp.ahead(active)]
        embedded = self.trunk.embedding(tokens)
        if batch.states is not None:
            kept = [state.contiguous() for state in batch.states.unbind(1)]
            return kept[0], BranchPoint(kept[-1], tokens, embedded, positions)
        if active:
            output, branch = self.mtp.through_trunk(
                self.trunk, embedded[:, :seq_len], positions, key
            )
        else:
            output = self.trunk(embedded[:, :seq_len], positions)
            branch = output.final
        return output.final, BranchPoint(branch, tokens, embedded, positions)

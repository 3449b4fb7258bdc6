"""The model: trunk, shared head and MTP stack. It knows nothing of losses or of training.

Shapes: B batch, T positions, C d_model, K depths, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from data_modules.windows import WindowBatch
from mtp_lightning.mtp.base import Draw, MTPConfig, MTPStack
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.mtp.parameter_free import ParameterFreeConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.init import initialise
from mtp_lightning.nn.trunk import Trunk

# The names of the variants in checkpoints. A checkpoint's config is data: it can ask for these
# and for nothing else.
MTP_VARIANTS: dict[str, type[MTPConfig]] = {
    "none": NoMTPConfig,
    "sequential": SequentialConfig,
    "parallel": ParallelConfig,
    "linear": LinearConfig,
    "parameter_free": ParameterFreeConfig,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Trunk and stack together: what a checkpoint stores to build its model again."""

    trunk: TrunkConfig
    mtp: MTPConfig

    def num_params(self) -> int:
        """All weights, tied ones once."""
        return self.trunk.num_params() + self.mtp.num_params(self.trunk)

    def num_active_params(self) -> int:
        """Those of them that one token goes through: all but the experts it is not sent to."""
        stack = self.mtp.num_params(self.trunk) - self.mtp.num_idle_params(self.trunk)
        return self.trunk.num_active_params() + stack

    def forward_flops_per_token(self, seq_len: int, active: Sequence[int] | None = None) -> int:
        """FLOPs of a forward pass for one position, attention and heads included.

        Args:
            seq_len: T, since attention's share grows with it.
            active: the MTP depths computed; by default all.
        """
        if active is None:
            active = range(1, self.mtp.depth + 1)
        blocks = self.trunk.blocks_flops(seq_len)
        return blocks + self.trunk.head_flops() + self.mtp.flops(self.trunk, seq_len, active)

    def flops_per_token(self, seq_len: int, active: Sequence[int] | None = None) -> int:
        """FLOPs of training on one position: forward, and twice as much backward.

        A frozen trunk has no backward pass; the frozen head has the half of one that leads on to
        the modules, and none for the main prediction.
        """
        forward = self.forward_flops_per_token(seq_len, active)
        if self.mtp.trains_trunk:
            return 3 * forward
        if active is None:
            active = range(1, self.mtp.depth + 1)
        modules = self.mtp.module_flops(self.trunk, seq_len, active)
        return forward + 2 * modules + self.mtp.projections(active) * self.trunk.head_flops()

    @property
    def variant(self) -> str:
        """The stack's name in :data:`MTP_VARIANTS`."""
        (name,) = (name for name, kind in MTP_VARIANTS.items() if type(self.mtp) is kind)
        return name

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        return {"trunk": self.trunk.to_dict(), "mtp": {"variant": self.variant, **asdict(self.mtp)}}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown variant or field.
        """
        mtp = mtp_from_dict(data["mtp"])
        return ModelConfig(trunk=TrunkConfig.from_dict(data["trunk"]), mtp=mtp)


def mtp_from_dict(data: dict[str, Any]) -> MTPConfig:
    """A stack's config from its variant and fields.

    Raises:
        ValueError: an unknown variant or field.
    """
    fields = dict(data)
    variant = fields.pop("variant", None)
    if variant not in MTP_VARIANTS:
        known = ", ".join(MTP_VARIANTS)
        raise ValueError(f"MTP variant '{variant}' is unknown here; known are {known}.")
    try:
        return MTP_VARIANTS[variant](**fields)
    except TypeError as error:
        raise ValueError(f"The model's config does not fit this version: {error}.") from error


@dataclass(frozen=True)
class Reading:
    """What the trunk made of a batch: all that the depths need.

    Attributes:
        final: the trunk's output [B, T, C], which the head projects.
        branch: the state [B, T, C] that the stack starts from.
        embedded: embedded tokens, [B, at least T, C].
        positions: of the windows.
    """

    final: Tensor
    branch: Tensor
    embedded: Tensor
    positions: Positions


class MTPModel(nn.Module):
    """Trunk + head + stack.

    Attributes:
        trunk: embedding, blocks and final norm.
        head: the output head, shared by every depth.
        mtp: the stack of further predictions.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config.trunk)
        embedding: nn.Parameter = self.trunk.embedding.weight  # type: ignore[assignment]
        tied = embedding if config.trunk.tie_embeddings else None
        self.head = Head(config.trunk.vocab_size, config.trunk.d_model, tied=tied)
        self.mtp: MTPStack = config.mtp.build(config.trunk)
        if not config.mtp.trains_trunk:
            self.trunk.requires_grad_(False)
            self.head.requires_grad_(False)

    @property
    def depth(self) -> int:
        """D."""
        return self.config.mtp.depth

    def initialise(self, seed: int) -> None:
        """Draw all weights anew."""
        assert self.config.trunk.init_std is not None
        initialise(self, std=self.config.trunk.init_std, seed=seed)
        self.mtp.initialise_own()

    def forward(
        self,
        batch: WindowBatch,
        active: Sequence[int] | None = None,
        *,
        draw: Draw | None = None,
    ) -> dict[int, Tensor]:
        """Hidden states of depth 0 and of the ``active`` MTP depths, ready for the head.

        Args:
            batch: windows built for this model's depth.
            active: depths in 1 .. D whose hidden states are wanted; by default all. What none
                of them needs is not computed.
            draw: what a stack's random choices in training depend on; None makes none.

        Returns:
            Depth -> [B, T, C], in the order of depths. Depth k at position i predicts token
            ``i + k + 1`` of the window.

        Raises:
            ValueError: the batch was built for another depth.
        """
        active = range(1, self.depth + 1) if active is None else sorted(active)
        return dict(self.states(batch, active, draw=draw))

    def states(
        self, batch: WindowBatch, active: Sequence[int], *, draw: Draw | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """What :meth:`forward` returns, depth by depth.

        Of a depth that no other reads, nothing is kept when the next one is asked for.
        """
        reading = self.read(batch, active)
        yield 0, reading.final
        history = [reading.branch]
        for k in self.mtp.steps(active):
            hidden = self.predict(k, reading, self.mtp.input_of(k, history, draw))
            if self.mtp.reads_tokens:
                history.append(hidden)
            if k in active:
                yield k, hidden
            del hidden

    def read(self, batch: WindowBatch, active: Sequence[int]) -> Reading:
        """The trunk's pass over a batch, for the ``active`` depths to start from.

        Raises:
            ValueError: the batch was built for another depth.
        """
        batch.require_depth(self.depth)
        seq_len = batch.seq_len
        documents = None if batch.documents is None else batch.documents[:, :seq_len]
        positions = Positions.of_window(
            self.config.trunk, seq_len, device=batch.tokens.device, documents=documents
        )
        steps = self.mtp.steps(active)
        ahead = max(steps, default=0) if self.mtp.reads_tokens else 0
        # One look-up for all depths: theirs are the same embeddings, shifted.
        embedded = self.trunk.embedding(batch.tokens[:, : seq_len + ahead])
        output = self.trunk(embedded[:, :seq_len], positions)
        branch = self.mtp.branch(self.trunk, output) if steps else output.final
        return Reading(output.final, branch, embedded, positions)

    def predict(self, k: int, reading: Reading, previous_BTC: Tensor) -> Tensor:
        """Hidden state [B, T, C] of depth ``k`` over whole windows."""
        seq_len = reading.branch.shape[1]
        ahead = k if self.mtp.reads_tokens else 0
        return self.mtp.step(
            k,
            branch_BTC=reading.branch,
            previous_BTC=previous_BTC,
            embedded_BTC=reading.embedded[:, ahead : ahead + seq_len],
            positions=reading.positions,
        )

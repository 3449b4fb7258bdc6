"""The trunk's shape and layers, and its parameters and FLOPs, before anything is built."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from mtp_lightning.errors import UserError
from mtp_lightning.nn.components import AttentionConfig, FeedForwardConfig, LayerConfig
from mtp_lightning.nn.shape import TrunkShape
from mtp_lightning.stored import require_text

Layer = TypeVar("Layer", bound=LayerConfig)


@dataclass(frozen=True, kw_only=True)
class TrunkConfig(TrunkShape):
    """A pre-norm decoder with RMSNorm, RoPE, and the layers that its components build.

    Latent attention with experts is DeepSeek-V3's trunk.

    Attributes:
        attention: the attention layers; grouped-query by default.
        feed_forward: the feed-forward layers; dense by default. Both may also be given as the
            result of their ``to_dict``.

    Raises:
        UserError: sizes do not fit together, or a layer is of the wrong kind.
    """

    attention: AttentionConfig = field(
        default_factory=lambda: AttentionConfig.from_dict({"variant": "grouped_query"})
    )
    feed_forward: FeedForwardConfig = field(
        default_factory=lambda: FeedForwardConfig.from_dict({"variant": "dense"})
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for family in (AttentionConfig, FeedForwardConfig):
            object.__setattr__(self, family.family, _component(family, vars(self)[family.family]))
        object.__setattr__(self, "d_head", self.attention.head_size(self))
        for component in (self.attention, self.feed_forward):
            component.check(self)

    @property
    def training_keys(self) -> list[str]:
        """Dotted keys of settings that change how the trunk is trained, not what its weights
        compute."""
        layers = (self.attention, self.feed_forward)
        own = [f"{layer.family}.{key}" for layer in layers for key in layer.training_keys]
        return ["recompute", *own]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        layers = {c.family: c.to_dict() for c in (self.attention, self.feed_forward)}
        return {**asdict(self), **layers}

    @staticmethod
    def from_dict(data: Mapping[str, Any], *, allow: Collection[str] = ()) -> TrunkConfig:
        """The inverse of :meth:`to_dict`.

        Args:
            data: the config in a checkpoint.
            allow: packages that may be imported for their own layers.

        Raises:
            UserError: a variant or field is unknown, or a module is not allowed.
        """
        require_text(data, source="the trunk's config")
        layers = {
            family.family: _component(family, data.get(family.family), allow)
            for family in (AttentionConfig, FeedForwardConfig)
        }
        try:
            return TrunkConfig(**{**data, **layers})
        except TypeError as error:
            raise UserError(f"The trunk's config does not fit this version: {error}.") from error

    @property
    def d_rope(self) -> int:
        """The part of a head that the rotary table is made for."""
        return self.attention.rotary_size(self)

    @property
    def rotary(self) -> dict[str, Any]:
        """Arguments of :func:`~mtp_lightning.nn.rope.rope_table`, except positions and dtype."""
        return {
            "d_head": self.d_rope,
            "theta": self.rope_theta,
            "scaling": self.rope_scaling,
            "turned": self.attention.turned_size(self),
        }

    def block_params(self, layer: int | None = None) -> int:
        """Parameters of one block: its layers and the norms before them.

        Args:
            layer: index in the trunk; None is a prediction module's block.
        """
        layers = (c.num_params(self, layer) for c in (self.attention, self.feed_forward))
        return sum(layers) + 2 * self.d_model

    def block_idle_params(self, layer: int | None = None) -> int:
        """Parameters of one block that a token does not use."""
        return sum(c.idle_params(self, layer) for c in (self.attention, self.feed_forward))

    def embedding_params(self) -> int:
        """Parameters of the embedding, which is also the head if they are tied."""
        return self.vocab_size * self.d_model

    def num_params(self) -> int:
        """Parameters of embedding, blocks, final norm and head; tied ones count once."""
        head = 0 if self.tie_embeddings else self.embedding_params()
        blocks = sum(self.block_params(layer) for layer in range(self.n_layers))
        return self.embedding_params() + blocks + self.d_model + head

    def num_active_params(self) -> int:
        """Parameters that one token uses: without idle experts, and without the embedding if it is
        only a lookup table."""
        idle = sum(self.block_idle_params(layer) for layer in range(self.n_layers))
        looked_up = 0 if self.tie_embeddings else self.embedding_params()
        return self.num_params() - idle - looked_up

    def block_flops(self, seq_len: int, layer: int | None = None) -> int:
        """Forward FLOPs of one block for one token of a window of ``seq_len``.

        A multiply-add counts as two FLOPs; norms and other elementwise operations are left out.
        """
        return sum(c.flops(self, seq_len, layer) for c in (self.attention, self.feed_forward))

    def head_flops(self) -> int:
        """Forward FLOPs of the output head for one token."""
        return 2 * self.d_model * self.vocab_size


def _component(family: type[Layer], value: Any, allow: Collection[str] = ()) -> Layer:
    if isinstance(value, Mapping):
        return family.from_dict(dict(value), allow=allow)
    if not isinstance(value, family):
        raise UserError(
            f"model.{family.family} must name a layer's config by _target_, not {value!r}."
        )
    return value

"""The trunk's shape and layers, before anything is built."""

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


def _component(family: type[Layer], value: Any, allow: Collection[str] = ()) -> Layer:
    if isinstance(value, Mapping):
        return family.from_dict(dict(value), allow=allow)
    if not isinstance(value, family):
        raise UserError(
            f"model.{family.family} must name a layer's config by _target_, not {value!r}."
        )
    return value

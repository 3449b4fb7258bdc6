"""The trunk's sizes and layers, before anything is built."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from mtp_lightning.errors import UserError
from mtp_lightning.nn.components import AttentionConfig, FeedForwardConfig, LayerConfig, check_whole
from mtp_lightning.nn.rope import Scaling, rope_scaling
from mtp_lightning.settings import require_bool, require_number
from mtp_lightning.stored import require_text

Layer = TypeVar("Layer", bound=LayerConfig)

# DeepSeek-V3 (section 4.2) initializes every matrix with std 0.006 at d_model 7168. To keep
# activations at the same scale, the std is proportional to 1 / sqrt(d_model).
_DEEPSEEK_STD = 0.006
_DEEPSEEK_WIDTH = 7168


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """A pre-norm decoder with RMSNorm, RoPE, and the layers that its components build.

    Latent attention with experts is DeepSeek-V3's trunk.

    Attributes:
        vocab_size: V, rows of the embedding and of the output head.
        d_model: C, width of the residual stream.
        n_layers: L, number of blocks.
        n_heads: query heads.
        n_kv_heads: key and value heads; ``n_heads`` must be a multiple of it.
        d_ff: inner width of a dense feed-forward layer.
        d_head: width of a query or key head; None is the attention layer's choice,
            ``d_model / n_heads`` for grouped-query attention.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how the frequencies are stretched, also as a mapping; None leaves them.
        norm_eps: epsilon of every RMSNorm.
        tie_embeddings: whether the output head is the embedding matrix.
        init_std: std of the normal initialization; by default 0.006 * sqrt(7168 / d_model).
        recompute: whether a training pass stores only the blocks' inputs and recomputes the rest in
            the backward pass (Chen et al. 2016): less memory, a third more arithmetic, the same
            gradients.
        attention: the attention layers; grouped-query by default.
        feed_forward: the feed-forward layers; dense by default. Both may also be the result of
            their ``to_dict``.

    Raises:
        UserError: a size is not positive, sizes do not fit together, or a layer is of the wrong
            kind.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    d_head: int = None  # type: ignore[assignment]  # None is replaced by a number
    rope_theta: float = 10_000.0
    rope_scaling: Scaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    init_std: float = None  # type: ignore[assignment]  # likewise
    recompute: bool = False
    attention: AttentionConfig = field(
        default_factory=lambda: AttentionConfig.from_dict({"variant": "grouped_query"})
    )
    feed_forward: FeedForwardConfig = field(
        default_factory=lambda: FeedForwardConfig.from_dict({"variant": "dense"})
    )

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff"]
        check_whole("model", self, sizes if self.d_head is None else [*sizes, "d_head"])
        require_number("model.rope_theta", self.rope_theta, above=1)
        require_number("model.norm_eps", self.norm_eps, least=0)
        require_bool("model.tie_embeddings", self.tie_embeddings)
        require_bool("model.recompute", self.recompute)
        if self.init_std is None:
            std = _DEEPSEEK_STD * (_DEEPSEEK_WIDTH / self.d_model) ** 0.5
            object.__setattr__(self, "init_std", std)
        require_number("model.init_std", self.init_std, least=0)
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", rope_scaling(self.rope_scaling))
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model.n_heads={self.n_heads} is not divisible by model.n_kv_heads="
                f"{self.n_kv_heads}: every key-value head serves the same number of query heads."
            )
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
        layer_keys = [f"{layer.family}.{key}" for layer in layers for key in layer.training_keys]
        return ["recompute", *layer_keys]

    @property
    def same_bits_in_wide_passes(self) -> bool:
        """Whether it is true of both layers (``LayerConfig``)."""
        return all(layer.same_bits_in_wide_passes for layer in (self.attention, self.feed_forward))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        layers = {c.family: c.to_dict() for c in (self.attention, self.feed_forward)}
        return {**asdict(self), **layers}

    @staticmethod
    def from_dict(data: Mapping[str, Any], *, allow: Collection[str] = ()) -> TrunkConfig:
        """The inverse of :meth:`to_dict`; layers may be imported from the packages in ``allow``.

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
    def rotary(self) -> dict[str, Any]:
        """Arguments of :func:`~mtp_lightning.nn.rope.rope_table`, except positions and dtype."""
        return {
            "d_head": self.attention.rope_head_dim(self),
            "theta": self.rope_theta,
            "scaling": self.rope_scaling,
            "rotary_dim": self.attention.rotary_dim(self),
        }


def _component(family: type[Layer], value: Any, allow: Collection[str] = ()) -> Layer:
    if isinstance(value, Mapping):
        return family.from_dict(dict(value), allow=allow)
    if not isinstance(value, family):
        raise UserError(
            f"model.{family.family} must name a layer's config by _target_, not {value!r}."
        )
    return value

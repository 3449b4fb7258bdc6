"""The interfaces of attention and feed-forward layers, of which a block has one each.

A layer is an ``nn.Module`` with a config that builds it. To add a layer, write such a pair in a
file of your own; its config only has to define ``build``:

    @dataclass(frozen=True, kw_only=True)
    class WindowConfig(AttentionConfig, variant="window"):
        window: int

        def build(self, trunk, layer):
            return WindowAttention(trunk, self)

The YAML names it: ``attention: {_target_: my_ideas.window.WindowConfig, window: 64}``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from mtp_lightning.errors import UserError
from mtp_lightning.registry import Registered
from mtp_lightning.settings import require_whole

if TYPE_CHECKING:
    from mtp_lightning.nn.config import TrunkConfig


def check_whole(group: str, owner: Any, names: Sequence[str], *, least: int = 1) -> None:
    """Refuse fields that are not whole numbers of at least ``least``.

    Raises:
        UserError: naming the key and its value.
    """
    for name in names:
        require_whole(f"{group}.{name}", getattr(owner, name), least=least)


@dataclass(frozen=True)
class CacheEntry:
    """The vectors that a layer's cache stores per token, each of ``width`` numbers: the key heads,
    then as many value heads; if they are ``shared``, every vector is both key and value."""

    n_vectors: int
    width: int
    shared: bool = False

    @property
    def n_kv_heads(self) -> int:
        """Number of key heads."""
        return self.n_vectors if self.shared else self.n_vectors // 2

    def split(self, stored_BMPH: Tensor) -> tuple[Tensor, Tensor]:
        """Split stored vectors into keys and values."""
        if self.shared:
            return stored_BMPH, stored_BMPH
        key_BMPH, value_BMPH = stored_BMPH.split(self.n_kv_heads, dim=1)
        return key_BMPH, value_BMPH


@dataclass(frozen=True, kw_only=True)
class LayerConfig(Registered, ABC):
    """Switches of a layer.

    In every method ``trunk`` is the trunk's config and ``layer`` the layer's index in it; None is
    the block of a prediction module.
    """

    # Fields that change how the layer is trained, not what its weights compute: a run that
    # continues another one may change them.
    training_keys: ClassVar[tuple[str, ...]] = ()
    # Whether a token's results have the same bits in every wide pass, such as a prompt's, on a CPU
    # with the C++ (``cpu/``). If not, every prompt is read in a pass of its own, and ``certify/``
    # promises equal logits only for texts whose prompt is read whole.
    same_bits_in_wide_passes: ClassVar[bool] = False

    @abstractmethod
    def build(self, trunk: TrunkConfig, layer: int | None) -> nn.Module:
        """The layer, with its weights not yet initialized."""

    def check(self, trunk: TrunkConfig) -> None:
        """Refuse a trunk that the layer does not fit into.

        Raises:
            UserError: naming the keys.
        """


class AttentionConfig(LayerConfig, family="attention"):
    """The layer that mixes positions.

    Its ``forward(x_BTC, ctx, layer)`` returns [B, T, C]. All layers of a pass share ``ctx``
    (``ForwardContext``): the rotary table, the mask and, in decoding, the cache. There the layer
    appends its ``cache_entry`` of every new token, at the index ``layer``.
    """

    modules: ClassVar[dict[str, str]] = {"grouped_query": "attention", "latent": "mla"}

    def head_size(self, trunk: TrunkConfig) -> int:
        """H, width of a query or key head.

        Raises:
            UserError: ``model.d_head`` or ``model.d_model`` does not allow one.
        """
        if trunk.d_head is None and trunk.d_model % trunk.n_heads:
            raise UserError(
                f"model.d_model={trunk.d_model} is not divisible by model.n_heads="
                f"{trunk.n_heads}: change one of them, or set model.d_head."
            )
        d_head = trunk.d_model // trunk.n_heads if trunk.d_head is None else trunk.d_head
        if d_head < 2 or d_head % 2:
            unset = " (model.d_model / model.n_heads)" if trunk.d_head is None else ""
            raise UserError(f"model.d_head={d_head}{unset} must be even: RoPE rotates pairs of it.")
        return d_head

    def rope_head_dim(self, trunk: TrunkConfig) -> int:
        """The number of dimensions of a head that the rotary table covers."""
        return trunk.d_head

    def rotary_dim(self, trunk: TrunkConfig) -> int:
        """How many of them are rotated; the others have angles of 0."""
        return self.rope_head_dim(trunk)

    def reads_blocks(self, trunk: TrunkConfig) -> bool:
        """Whether the layer accepts a block mask of documents (``document_attention.py``)."""
        return False

    def cache_entry(self, trunk: TrunkConfig) -> CacheEntry:
        """The vectors that the cache stores per token; by default keys and values of all key-value
        heads."""
        return CacheEntry(2 * trunk.n_kv_heads, trunk.d_head)


class FeedForwardConfig(LayerConfig, family="feed_forward"):
    """The layer that transforms every position separately.

    Its ``forward(x_BTC, ctx)`` returns [B, T, C]. It may add an auxiliary loss with
    ``ctx.auxiliary.add_loss`` if ``ctx.auxiliary`` is not None.
    """

    modules: ClassVar[dict[str, str]] = {"dense": "feed_forward", "experts": "moe"}

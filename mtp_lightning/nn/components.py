"""What a block is made of: the interfaces of attention and feed-forward layers.

A layer is an ``nn.Module`` and, beside it, a config that builds it and knows what it costs. A layer
of one's own is such a pair in a file of one's own; ``build`` is all that its config must say:

    @dataclass(frozen=True, kw_only=True)
    class WindowConfig(AttentionConfig, variant="window"):
        window: int

        def build(self, trunk, layer):
            return WindowAttention(trunk, self)

The YAML names it: ``attention: {_target_: my_ideas.window.WindowConfig, window: 64}``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtp_lightning.errors import UserError
from mtp_lightning.nn.places import Place
from mtp_lightning.nn.shape import TrunkShape
from mtp_lightning.registry import Registered


@dataclass(frozen=True)
class CacheEntry:
    """What decoding keeps of a token in a layer.

    Attributes:
        n_vectors: first the key heads, then as many value heads.
        width: of each.
        shared: every vector is key and value at once.
    """

    n_vectors: int
    width: int
    shared: bool = False

    @property
    def n_kv_heads(self) -> int:
        """Key heads."""
        return self.n_vectors if self.shared else self.n_vectors // 2

    def split(self, stored_BMPH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values among stored vectors."""
        if self.shared:
            return stored_BMPH, stored_BMPH
        key_BMPH, value_BMPH = stored_BMPH.split(self.n_kv_heads, dim=1)
        return key_BMPH, value_BMPH


@dataclass(frozen=True, kw_only=True)
class LayerConfig(Registered, ABC):
    """Switches of a layer, and its facts.

    In every method ``trunk`` is the trunk's config and ``layer`` the place in it, for layers that
    differ by place; None asks for the block of a prediction module.
    """

    # Fields that say how the layer is trained, not what its weights compute: they may change
    # between a run and what goes on from it.
    training_keys: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def build(self, trunk: TrunkShape, layer: int | None) -> nn.Module:
        """The layer itself, uninitialised."""

    def check(self, trunk: TrunkShape) -> None:
        """Refuse a trunk that the layer does not fit into.

        Raises:
            UserError: naming the keys.
        """

    def num_params(self, trunk: TrunkShape, layer: int | None) -> int:
        """All weights; by default those of the layer, built without memory."""
        return self._count(trunk, layer)[0]

    def matrix_params(self, trunk: TrunkShape, layer: int | None) -> int:
        """Weights of matrices that a token is multiplied with; by default all of them."""
        return self._count(trunk, layer)[1]

    def idle_params(self, trunk: TrunkShape, layer: int | None) -> int:
        """Weights that take no part in a token, such as experts it is not sent to."""
        return 0

    def flops(self, trunk: TrunkShape, seq_len: int, layer: int | None) -> int:
        """Forward FLOPs for one token of a window of ``seq_len``; a multiply-add counts as two."""
        return 2 * self.matrix_params(trunk, layer)

    def hf_places(self, trunk: TrunkShape, layer: int | None) -> Iterable[Place]:
        """Where the layer's weights lie in Hugging Face's layouts, by names within the layer.

        Raises:
            UserError: no layout has the layer.
        """
        raise UserError(
            f"model.{self.family} of the variant {self.variant} cannot be exported: it has no "
            "names in a layout of Hugging Face's."
        )

    def _count(self, trunk: TrunkShape, layer: int | None) -> tuple[int, int]:
        key = repr(self), layer
        if key not in trunk.counted:
            with torch.device("meta"):
                weights = list(self.build(trunk, layer).parameters())
            matrices = sum(w.numel() for w in weights if w.dim() > 1)
            trunk.counted[key] = sum(w.numel() for w in weights), matrices
        return trunk.counted[key]


class AttentionConfig(LayerConfig, family="attention"):
    """The layer that mixes positions.

    Its ``forward(x_BTC, positions, layer)`` returns [B, T, C]. ``positions`` is what all layers of
    a pass share: rotary table, mask and, when decoding, the cache, to which the layer appends its
    ``cache_entry`` of every new token, at its place ``layer``.
    """

    def head_size(self, trunk: TrunkShape) -> int:
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
            raise UserError(f"model.d_head={d_head} must be even: RoPE turns pairs of it.")
        return d_head

    def rotary_size(self, trunk: TrunkShape) -> int:
        """The part of a head that the rotary table is made for."""
        return trunk.d_head

    def turned_size(self, trunk: TrunkShape) -> int:
        """What of it is turned by its position; the rest has angles of 0."""
        return self.rotary_size(trunk)

    def reads_blocks(self, trunk: TrunkShape) -> bool:
        """Whether the mask of documents may be one in blocks (``kernels/document_attention.py``)
        instead of a tensor; by default not."""
        return False

    def cache_entry(self, trunk: TrunkShape) -> CacheEntry:
        """What decoding keeps of a token; by default keys and values of all key-value heads."""
        return CacheEntry(2 * trunk.n_kv_heads, trunk.d_head)

    def flops(self, trunk: TrunkShape, seq_len: int, layer: int | None) -> int:
        """As :meth:`LayerConfig.flops`. All ``seq_len`` keys count for every query, as though there
        were no causal mask: the usual convention, so that figures compare."""
        mixing = 4 * seq_len * trunk.n_heads * trunk.d_head
        return 2 * self.matrix_params(trunk, layer) + mixing


class FeedForwardConfig(LayerConfig, family="feed_forward"):
    """The layer that works on every position by itself.

    Its ``forward(x_BTC, positions)`` returns [B, T, C]. Of ``positions`` it may use the ledger: an
    auxiliary loss goes there by ``positions.ledger.add_loss``, where there is one.
    """

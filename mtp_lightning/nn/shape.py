"""Sizes and settings that all layers of a trunk share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.nn.rope_scaling import RopeScaling, YarnScaling, rope_scaling
from mtp_lightning.settings import require_bool, require_number, require_whole

# DeepSeek-V3 (section 4.2) initializes every matrix with std 0.006 at d_model 7168. To keep
# activations at the same scale, the std is proportional to 1 / sqrt(d_model).
_DEEPSEEK_STD = 0.006
_DEEPSEEK_WIDTH = 7168


def check_whole(group: str, owner: Any, names: Sequence[str], *, least: int = 1) -> None:
    """Refuse fields that are not whole numbers of at least ``least``.

    Raises:
        UserError: naming the key and its value.
    """
    for name in names:
        require_whole(f"{group}.{name}", getattr(owner, name), least=least)


@dataclass(frozen=True, kw_only=True)
class TrunkShape:
    """Sizes and settings of a pre-norm decoder that its layers may read.

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

    Raises:
        UserError: a size is not positive, or sizes do not fit together.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    d_head: int = None  # type: ignore[assignment]  # TrunkConfig replaces None by a number
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | YarnScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    init_std: float | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
        check_whole("model", self, sizes)
        require_number("model.rope_theta", self.rope_theta, above=1)
        require_number("model.norm_eps", self.norm_eps, least=0)
        require_bool("model.tie_embeddings", self.tie_embeddings)
        require_bool("model.recompute", self.recompute)
        if self.init_std is not None:
            require_number("model.init_std", self.init_std, least=0)
        if self.d_head is not None:
            check_whole("model", self, ["d_head"])
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", rope_scaling(self.rope_scaling))
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model.n_heads={self.n_heads} is not divisible by model.n_kv_heads="
                f"{self.n_kv_heads}: every key-value head serves the same number of query heads."
            )
        if self.init_std is None:
            std = _DEEPSEEK_STD * (_DEEPSEEK_WIDTH / self.d_model) ** 0.5
            object.__setattr__(self, "init_std", std)

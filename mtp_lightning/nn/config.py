"""The trunk's shape, and what it costs, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

from mtp_lightning.nn.deepseek_config import ExpertsConfig, LatentAttentionConfig, check_whole
from mtp_lightning.nn.rope_scaling import RopeScaling

# DeepSeek-V3 (section 4.2) initialises every matrix with std 0.006 at d_model 7168. The scale that
# keeps activations alike at another width goes with 1 / sqrt(d_model).
_DEEPSEEK_STD = 0.006
_DEEPSEEK_WIDTH = 7168


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """Shape of a pre-norm decoder: RMSNorm, RoPE, attention, SwiGLU.

    Attention is grouped-query, or latent with ``latent_attention``; the feed-forward layers are
    dense, or mixtures of experts with ``experts``. Both together are DeepSeek-V3's trunk.

    Attributes:
        vocab_size: V, rows of the embedding and of the output head.
        d_model: C, width of the residual stream.
        n_layers: L, number of blocks.
        n_heads: query heads.
        n_kv_heads: key and value heads; ``n_heads`` must be a multiple of it.
        d_ff: inner width of a dense feed-forward layer.
        d_head: width of one head; by default ``d_model / n_heads``, and with latent attention that
            of a query or key.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched; None leaves them. A mapping is taken, too.
        norm_eps: epsilon of every RMSNorm.
        tie_embeddings: the output head is the embedding matrix.
        init_std: std of the normal initialisation; by default 0.006 * sqrt(7168 / d_model).
        qk_norm: RMSNorm on every query and key head before RoPE (Qwen3).
        qkv_bias: a bias on queries, keys and values, which starts at 0 (Qwen2).
        recompute: a training pass keeps only the blocks' inputs and computes the rest again
            (Chen et al. 2016): less memory, a third more arithmetic, the same gradients.
        latent_attention: shape of multi-head latent attention; None is grouped-query attention.
        experts: shape of the mixture of experts; None keeps every layer dense. A mapping with the
            same keys is taken too, for both.

    Raises:
        ValueError: a size is not positive, or sizes do not fit together.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    d_head: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    init_std: float | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    recompute: bool = False
    latent_attention: LatentAttentionConfig | None = None
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
        check_whole("model", self, sizes)
        if isinstance(self.latent_attention, dict):
            latent = LatentAttentionConfig(**self.latent_attention)
            object.__setattr__(self, "latent_attention", latent)
        if isinstance(self.experts, dict):
            object.__setattr__(self, "experts", ExpertsConfig(**self.experts))
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_heads={self.n_heads} is not divisible by model.n_kv_heads="
                f"{self.n_kv_heads}: every key-value head serves the same number of query heads."
            )
        self._check_deepseek()
        if self.d_head is None:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"model.d_model={self.d_model} is not divisible by model.n_heads="
                    f"{self.n_heads}: change one of them, or set model.d_head."
                )
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        if self.d_head is None or self.d_head < 2 or self.d_head % 2:
            raise ValueError(f"model.d_head={self.d_head} must be even: RoPE turns pairs of it.")
        if self.init_std is None:
            std = _DEEPSEEK_STD * (_DEEPSEEK_WIDTH / self.d_model) ** 0.5
            object.__setattr__(self, "init_std", std)

    def _check_deepseek(self) -> None:
        if self.latent_attention is not None:
            if self.n_kv_heads != self.n_heads:
                raise ValueError(
                    f"model.n_kv_heads={self.n_kv_heads} must be model.n_heads={self.n_heads} with "
                    "latent attention: all heads read the same latent."
                )
            if self.qk_norm:
                raise ValueError(
                    "model.qk_norm=true is for grouped-query attention: latent attention has "
                    "norms on its latents. Set it false."
                )
            if self.qkv_bias:
                raise ValueError(
                    "model.qkv_bias=true is for grouped-query attention: latent attention has no "
                    "biases. Set it false."
                )
            d_head = self.latent_attention.d_head
            if self.d_head not in (None, d_head):
                raise ValueError(
                    f"model.d_head={self.d_head} must be null, or d_nope + d_rope = {d_head} of "
                    "model.latent_attention."
                )
            object.__setattr__(self, "d_head", d_head)
        if self.experts is not None and self.experts.first_k_dense > self.n_layers:
            raise ValueError(
                f"model.experts.first_k_dense={self.experts.first_k_dense} is more than "
                f"model.n_layers={self.n_layers}: lower it."
            )

    def has_experts(self, layer: int | None = None) -> bool:
        """Whether trunk layer ``layer`` is a mixture of experts; None asks for a prediction
        module's block, which is of the kind of the deeper layers."""
        if self.experts is None:
            return False
        return layer is None or layer >= self.experts.first_k_dense

    @property
    def d_rope(self) -> int:
        """The part of a head that is turned by its position."""
        assert self.d_head is not None
        return self.d_head if self.latent_attention is None else self.latent_attention.d_rope

    @property
    def qkv_width(self) -> int:
        """Output width of the fused query, key and value projection."""
        assert self.d_head is not None
        return (self.n_heads + 2 * self.n_kv_heads) * self.d_head

    @property
    def attention_width(self) -> int:
        """Width of the concatenated query heads."""
        assert self.d_head is not None
        return self.n_heads * self.d_head

    def block_matrix_params(self, layer: int | None = None) -> int:
        """Weights of one block that a token is multiplied with: of the experts, the chosen ones.

        Args:
            layer: of the trunk; None is a prediction module's block.
        """
        if self.latent_attention is None:
            attention = self.d_model * (self.qkv_width + self.attention_width)
        else:
            attention = self.latent_attention.matrix_params(self.d_model, self.n_heads)
        if self.has_experts(layer):
            assert self.experts is not None
            return attention + self.experts.active_matrix_params(self.d_model)
        return attention + 3 * self.d_model * self.d_ff

    def _block_vectors(self) -> int:
        if self.latent_attention is not None:
            return 2 * self.d_model + self.latent_attention.norm_params()
        assert self.d_head is not None
        norms = 2 * self.d_model + (2 * self.d_head if self.qk_norm else 0)
        return norms + (self.qkv_width if self.qkv_bias else 0)

    def block_params(self, layer: int | None = None) -> int:
        """All weights of one block: its matrices, norms and biases."""
        active = self.block_matrix_params(layer) + self._block_vectors()
        return active + self.block_idle_params(layer)

    def block_idle_params(self, layer: int | None = None) -> int:
        """Weights of one block's experts that a token is not sent to."""
        if not self.has_experts(layer):
            return 0
        assert self.experts is not None
        experts = self.experts
        return experts.matrix_params(self.d_model) - experts.active_matrix_params(self.d_model)

    def embedding_params(self) -> int:
        """Weights of the embedding, which is also the head where they are tied."""
        return self.vocab_size * self.d_model

    def num_params(self) -> int:
        """Weights of embedding, blocks, final norm and head; tied ones count once."""
        head = 0 if self.tie_embeddings else self.embedding_params()
        blocks = sum(self.block_params(layer) for layer in range(self.n_layers))
        return self.embedding_params() + blocks + self.d_model + head

    def num_active_params(self) -> int:
        """Weights that take part in one token: without idle experts, and without the embedding
        where it is only looked up."""
        idle = sum(self.block_idle_params(layer) for layer in range(self.n_layers))
        looked_up = 0 if self.tie_embeddings else self.embedding_params()
        return self.num_params() - idle - looked_up

    def block_flops(self, seq_len: int, layer: int | None = None) -> int:
        """Forward FLOPs of one block for one token; ``layer`` as in :meth:`block_matrix_params`.

        A multiply-add counts as two. Attention counts all ``seq_len`` keys for every query, as
        though there were no causal mask: the usual convention, so that figures compare.
        """
        attention = 4 * seq_len * self.attention_width
        if self.latent_attention is not None:
            latent = self.latent_attention
            attention = 2 * seq_len * self.n_heads * (latent.d_head + latent.d_value)
        return 2 * self.block_matrix_params(layer) + attention

    def blocks_flops(self, seq_len: int) -> int:
        """Forward FLOPs of all blocks for one token."""
        return sum(self.block_flops(seq_len, layer) for layer in range(self.n_layers))

    def head_flops(self) -> int:
        """Forward FLOPs of the output head for one token."""
        return 2 * self.d_model * self.vocab_size

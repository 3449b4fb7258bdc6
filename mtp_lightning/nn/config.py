"""The trunk's shape, and what it costs, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

# DeepSeek-V3 (section 4.2) initialises every matrix with std 0.006 at d_model 7168. The scale that
# keeps activations alike at another width goes with 1 / sqrt(d_model).
_DEEPSEEK_STD = 0.006
_DEEPSEEK_WIDTH = 7168


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """Shape of a pre-norm decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Attributes:
        vocab_size: V, rows of the embedding and of the output head.
        d_model: C, width of the residual stream.
        n_layers: L, number of blocks.
        n_heads: query heads.
        n_kv_heads: key and value heads; ``n_heads`` must be a multiple of it.
        d_ff: inner width of the feed-forward layer.
        d_head: width of one head; by default ``d_model / n_heads``.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every RMSNorm.
        tie_embeddings: the output head is the embedding matrix.
        init_std: std of the normal initialisation; by default 0.006 * sqrt(7168 / d_model).

    Raises:
        ValueError: a size is not positive, or the head counts do not divide.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    d_head: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    init_std: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"model.{name} must be a whole number of at least 1, not {value}.")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_heads={self.n_heads} is not divisible by model.n_kv_heads="
                f"{self.n_kv_heads}: every key-value head serves the same number of query heads."
            )
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

    def block_matrix_params(self) -> int:
        """Weights of one block that take part in a matrix product, once a token each."""
        attention = self.d_model * (self.qkv_width + self.attention_width)
        return attention + 3 * self.d_model * self.d_ff

    def block_params(self) -> int:
        """All weights of one block: its matrices and two norms."""
        return self.block_matrix_params() + 2 * self.d_model

    def embedding_params(self) -> int:
        """Weights of the embedding, which is also the head where they are tied."""
        return self.vocab_size * self.d_model

    def num_params(self) -> int:
        """Weights of embedding, blocks, final norm and head; tied ones count once."""
        head = 0 if self.tie_embeddings else self.embedding_params()
        blocks = self.n_layers * self.block_params()
        return self.embedding_params() + blocks + self.d_model + head

    def block_flops(self, seq_len: int) -> int:
        """Forward FLOPs of one block for one token.

        A multiply-add counts as two. Attention counts all ``seq_len`` keys for every query, as
        though there were no causal mask: the usual convention, so that figures compare.
        """
        return 2 * self.block_matrix_params() + 4 * seq_len * self.attention_width

    def head_flops(self) -> int:
        """Forward FLOPs of the output head for one token."""
        return 2 * self.d_model * self.vocab_size

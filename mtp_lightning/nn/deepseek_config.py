"""Shapes of DeepSeek's two layers: multi-head latent attention and the mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def check_whole(group: str, owner: Any, names: Sequence[str], *, least: int = 1) -> None:
    """Refuse fields that are not whole numbers of at least ``least``.

    Raises:
        ValueError: naming the key and its value.
    """
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"{group}.{name} must be a whole number of at least {least}, not {value}."
            )


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1; V3, eq. 1-11).

    Attributes:
        q_rank: d_c', width of the query latent; None projects queries directly (V2-Lite).
        kv_rank: d_c, width of the latent that keys and values are made of.
        d_nope: part of a query or key head that carries no position.
        d_rope: part that is turned by its position; the key's is shared by all heads. Even.
        d_value: width of a value head.
        norm_eps: epsilon of the norms on the latents; None is the trunk's.

    Raises:
        ValueError: a width is not positive, or ``d_rope`` is odd.
    """

    q_rank: int | None
    kv_rank: int
    d_nope: int
    d_rope: int
    d_value: int
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        check_whole("model.latent_attention", self, ("kv_rank", "d_nope", "d_rope", "d_value"))
        if self.q_rank is not None:
            check_whole("model.latent_attention", self, ("q_rank",))
        if self.d_rope % 2:
            raise ValueError(
                f"model.latent_attention.d_rope={self.d_rope} must be even: RoPE turns pairs of it."
            )

    @property
    def d_head(self) -> int:
        """Width of a query or key head."""
        return self.d_nope + self.d_rope

    @property
    def d_cached(self) -> int:
        """Numbers kept for a token when decoding: its latent and its rotary key."""
        return self.kv_rank + self.d_rope

    def matrix_params(self, d_model: int, n_heads: int) -> int:
        """Weights of the projections."""
        queries = n_heads * self.d_head
        query = d_model * queries
        if self.q_rank is not None:
            query = self.q_rank * (d_model + queries)
        key_value = d_model * self.d_cached + self.kv_rank * n_heads * (self.d_nope + self.d_value)
        return query + key_value + n_heads * self.d_value * d_model

    def norm_params(self) -> int:
        """Gains of the norms on the latents."""
        return self.kv_rank + (self.q_rank or 0)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """DeepSeekMoE with balancing free of an auxiliary loss (DeepSeek-V3, section 2.1.2).

    Attributes:
        n_routed: E, experts that tokens are routed to.
        n_shared: experts that every token goes through, built as one of ``n_shared`` times the
            width.
        top_k: routed experts a token is sent to.
        d_expert: inner width of one expert.
        first_k_dense: the first layers of the trunk that stay dense.
        n_groups: groups of neighbouring experts; 1 is no limit.
        top_groups: groups that a token may choose its experts from, those with the largest sums
            of their two best biased scores.
        scaling: factor of the gates after they are renormalised over the chosen experts.
        bias_rate: gamma, by how much an optimizer step moves an expert's bias.
        bias_frozen: the last fraction of the run in which the biases no longer move.
        sequence_loss: alpha of the sequence-wise balance loss (eq. 17-20); 0 is none.

    Raises:
        ValueError: sizes that do not fit together; the message names them.
    """

    n_routed: int
    n_shared: int
    top_k: int
    d_expert: int
    first_k_dense: int = 0
    n_groups: int = 1
    top_groups: int = 1
    scaling: float = 1.0
    bias_rate: float = 0.001
    bias_frozen: float = 0.0
    sequence_loss: float = 0.0

    def __post_init__(self) -> None:
        group = "model.experts"
        check_whole(group, self, ("n_routed", "top_k", "d_expert", "n_groups", "top_groups"))
        check_whole(group, self, ("n_shared", "first_k_dense"), least=0)
        if self.n_routed % self.n_groups:
            raise ValueError(
                f"{group}.n_routed={self.n_routed} is not divisible by {group}.n_groups="
                f"{self.n_groups}: every group has the same number of experts."
            )
        if self.top_groups > self.n_groups:
            raise ValueError(
                f"{group}.top_groups={self.top_groups} is more than {group}.n_groups="
                f"{self.n_groups}: lower it."
            )
        size = self.n_routed // self.n_groups
        if self.n_groups > 1 and size < 2:
            raise ValueError(
                f"{group}.n_groups={self.n_groups} leaves {size} expert a group, and a group is "
                "scored by its best two: use fewer groups."
            )
        if self.top_k > self.top_groups * size:
            raise ValueError(
                f"{group}.top_k={self.top_k} experts do not exist in {group}.top_groups="
                f"{self.top_groups} groups of {size}: lower top_k, or allow more groups."
            )
        for name in ("bias_rate", "sequence_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"{group}.{name} must be 0 or more, not {getattr(self, name)}.")
        if not 0 <= self.bias_frozen <= 1:
            raise ValueError(f"{group}.bias_frozen must be in [0, 1], not {self.bias_frozen}.")
        if not self.scaling > 0:
            raise ValueError(f"{group}.scaling must be above 0, not {self.scaling}.")

    def matrix_params(self, d_model: int) -> int:
        """Weights of router and all experts."""
        return d_model * (self.n_routed + 3 * (self.n_routed + self.n_shared) * self.d_expert)

    def active_matrix_params(self, d_model: int) -> int:
        """Weights that one token is multiplied with: router, shared and chosen experts."""
        return d_model * (self.n_routed + 3 * (self.top_k + self.n_shared) * self.d_expert)

    def rate(self, done: float) -> float:
        """gamma when the fraction ``done`` of the run lies behind."""
        return 0.0 if done >= 1.0 - self.bias_frozen else self.bias_rate

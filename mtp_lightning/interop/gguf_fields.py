"""The description of a model in a GGUF file: llama.cpp's keys, written and read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from mtp_lightning.errors import UserError
from mtp_lightning.interop.config_json import trunk_type
from mtp_lightning.interop.gguf_layout import DRAFTING, PLAIN, Layout
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig

# The layout of the trunk, where the architecture alone does not tell it.
TRUNK = "mtp_lightning.trunk"
# The spread of new modules' matrices, which llama.cpp has no key for.
SPREAD = "mtp_lightning.initializer_range"
_SOFTMAX, _SIGMOID = 1, 2
# Keys whose values may be fractional.
_DECIMAL = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "expert_weights_scale")
Value = int | float | bool


def to_fields(layout: Layout, *, max_positions: int) -> dict[str, Value]:
    """The values of ``ARCH.KEY`` by ``KEY``.

    Args:
        layout: how the model is written.
        max_positions: the context length that the file states.
    """
    trunk, depth = layout.config.trunk, layout.config.mtp.depth
    a = trunk.attention
    found: dict[str, Value] = {
        "block_count": trunk.n_layers + depth,
        "context_length": max_positions,
        "vocab_size": trunk.vocab_size,
        "embedding_length": trunk.d_model,
        "feed_forward_length": trunk.d_ff,
        "attention.head_count": trunk.n_heads,
        "attention.head_count_kv": trunk.n_kv_heads,
        "attention.key_length": trunk.d_head,
        "attention.value_length": trunk.d_head,
        "attention.layer_norm_rms_epsilon": float(trunk.norm_eps),
        "rope.freq_base": float(trunk.rope_theta),
    }
    if isinstance(a, LatentAttentionConfig):
        found |= {
            # llama.cpp computes with one head of keys, the latent with the rotary part.
            "attention.head_count_kv": 1,
            "attention.key_length": a.d_cached,
            "attention.value_length": a.kv_rank,
            "attention.key_length_mla": a.d_head,
            "attention.value_length_mla": a.d_value,
            "attention.q_lora_rank": a.q_rank or 0,
            "attention.kv_lora_rank": a.kv_rank,
            "rope.dimension_count": a.d_rope,
        }
    else:
        assert isinstance(a, GroupedQueryConfig)
        found["rope.dimension_count"] = a.turned_size(trunk)
    if depth:
        found["nextn_predict_layers"] = depth
    if layout.arch in ("glm4moe", "deepseek2", "qwen3moe"):
        found |= _experts(layout)
    return found


def _experts(layout: Layout) -> dict[str, Value]:
    trunk, e = layout.config.trunk, layout.config.trunk.feed_forward
    if not isinstance(e, ExpertsConfig):  # the mixture of gguf_layout.py
        n = layout.narrow
        e = ExpertsConfig(n_routed=1, n_shared=trunk.d_ff // n, top_k=1, d_expert=n)
        dense = trunk.n_layers
    else:
        dense = e.first_k_dense
    found: dict[str, Value] = {
        "leading_dense_block_count": dense,
        "expert_count": e.n_routed,
        "expert_used_count": e.top_k,
        "expert_shared_count": 1 if layout.lacks_shared else e.n_shared,
        "expert_feed_forward_length": e.d_expert,
        "expert_weights_norm": True,
        "expert_weights_scale": float(e.scaling),
        "expert_gating_func": _SIGMOID if e.scoring == "sigmoid" else _SOFTMAX,
    }
    if e.top_groups < e.n_groups:
        found |= {"expert_group_count": e.n_groups, "expert_group_used_count": e.top_groups}
    return found


def own_fields(layout: Layout) -> dict[str, str | float]:
    """The values of this project's own keys."""
    trunk = layout.config.trunk
    assert trunk.init_std is not None
    kind = trunk_type(trunk) + (" dense" if layout.dense else "")
    return {TRUNK: kind, SPREAD: float(trunk.init_std)}


def to_json(
    get: Callable[[str], Any], tensors: Collection[str], *, source: str
) -> tuple[dict[str, Any], bool]:
    """The fields of a config.json, and whether a mixture in the module stands for a dense layer.

    Args:
        get: the content of a key of the file; None if it is not there.
        tensors: names of the file's tensors.
        source: the file, for messages.

    Raises:
        UserError: an architecture that is not read, or a key that is missing.
    """
    arch = get("general.architecture")
    if arch not in PLAIN.values():
        raise UserError(
            f"{source} has the architecture {arch}, which cannot be imported: known are "
            f"{', '.join(dict.fromkeys(PLAIN.values()))}."
        )

    def need(key: str, default: Any = None) -> Any:
        found = get(f"{arch}.{key}")
        if found is None and default is None:
            raise UserError(f"{source} has no {arch}.{key}: the trunk's shape is unknown.")
        found = default if found is None else found
        if isinstance(found, float) and key in _DECIMAL:
            return _decimal(found)
        if not isinstance(found, int) or found < 0:
            raise UserError(f"{source} has {arch}.{key}={str(found)[:40]}, which is not a count.")
        return found

    own = {theirs: ours for ours, theirs in PLAIN.items() if ours != "mistral"}
    kind, _, dense = str(get(TRUNK) or own[arch]).partition(" ")
    if arch not in (PLAIN.get(kind), DRAFTING.get(kind)):
        raise UserError(f"{source} is damaged: {TRUNK} does not belong to the architecture {arch}.")
    depth = need("nextn_predict_layers", 0)
    layers = need("block_count") - depth
    width, heads = need("embedding_length"), need("attention.head_count")
    kv_heads = need("attention.head_count_kv", heads)
    size = need("attention.key_length", width // max(heads, 1))
    fields: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "max_position_embeddings": need("context_length", 2048),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_theta": need("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "num_nextn_predict_layers": depth,
    }
    if isinstance(spread := get(SPREAD), float):
        fields["initializer_range"] = _decimal(spread)
    if kind == "deepseek_v3":
        turned = need("rope.dimension_count")
        fields |= {
            "q_lora_rank": need("attention.q_lora_rank", 0) or None,
            "kv_lora_rank": need("attention.kv_lora_rank"),
            "qk_rope_head_dim": turned,
            "qk_nope_head_dim": need("attention.key_length_mla") - turned,
            "v_head_dim": need("attention.value_length_mla"),
        }
    else:
        fields["partial_rotary_factor"] = need("rope.dimension_count", size) / max(size, 1)
    if kind == "glm4_moe":
        fields["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
        fields["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if kind in ("glm4_moe", "deepseek_v3", "qwen3_moe"):
        fields |= _experts_json(need, kind)
    return fields, bool(dense)


def _decimal(found: float) -> float:
    """A number stored in 4 bytes: the shortest decimal that gives these bytes was meant."""
    return float(str(np.float32(found)))


def _experts_json(need: Callable[..., Any], kind: str) -> dict[str, Any]:
    dense = need("leading_dense_block_count", 0)
    fields: dict[str, Any] = {
        "num_experts_per_tok": need("expert_used_count"),
        "moe_intermediate_size": need("expert_feed_forward_length"),
        "norm_topk_prob": bool(need("expert_weights_norm", True)),
    }
    if kind == "qwen3_moe":
        return fields | {
            "num_experts": need("expert_count"),
            "mlp_only_layers": list(range(dense)),
        }
    groups = need("expert_group_count", 1)
    # llama.cpp takes softmax where an old file of deepseek2 does not say it.
    gating = need("expert_gating_func", _SIGMOID if kind == "glm4_moe" else _SOFTMAX)
    return fields | {
        "n_routed_experts": need("expert_count"),
        "n_shared_experts": need("expert_shared_count", 0),
        "routed_scaling_factor": need("expert_weights_scale", 1.0),
        "first_k_dense_replace": dense,
        "n_group": groups,
        "topk_group": need("expert_group_used_count", groups),
        "scoring_func": "sigmoid" if gating == _SIGMOID else f"number {gating}",
    }

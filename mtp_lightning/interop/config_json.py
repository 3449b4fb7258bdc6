"""Writes ``config.json`` of a Hugging Face folder for a model of this project."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.interop.weight_map import is_mimo
from mtp_lightning.model import ModelConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.feed_forward import DenseConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.nn.rope import YarnScaling

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "mimo": "MiMoForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}

# transformers' names for the settings of a trunk.
TRUNK = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
# Epsilon of DeepSeek-V3's norms on the latents in transformers, regardless of rms_norm_eps.
LATENT_EPS = 1e-6
# DeepSeek-V3's names for the settings of latent attention and of experts.
LATENT = {
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "d_nope": "qk_nope_head_dim",
    "d_rope": "qk_rope_head_dim",
    "d_value": "v_head_dim",
}
EXPERTS = {
    "n_routed": "n_routed_experts",
    "n_shared": "n_shared_experts",
    "top_k": "num_experts_per_tok",
    "d_expert": "moe_intermediate_size",
    "first_k_dense": "first_k_dense_replace",
    "n_groups": "n_group",
    "top_groups": "topk_group",
    "scaling": "routed_scaling_factor",
}
# The class of transformers for a layout whose own class comes as code with the model.
STANDS_FOR = {"mimo": "qwen2"}


def model_type(config: ModelConfig) -> str:
    """The layout that computes the same as a model, or as its trunk if the stack has no layout.

    Raises:
        UserError: if there is none.
    """
    return "mimo" if is_mimo(config) else trunk_type(config.trunk)


def trunk_type(trunk: TrunkConfig) -> str:
    """The layout that computes the same as a trunk.

    Raises:
        UserError: if there is none.
    """
    attention, feed_forward = trunk.attention, trunk.feed_forward
    # Exact classes, since subclasses may compute something else.
    kinds = type(attention), type(feed_forward)
    if kinds in ((LatentAttentionConfig, DenseConfig), (LatentAttentionConfig, ExpertsConfig)):
        _check_deepseek(trunk)
        return "deepseek_v3"
    if mixture := _mixture_type(trunk):
        return mixture
    if kinds != (GroupedQueryConfig, DenseConfig):
        raise UserError(
            f"model.attention={attention.variant} with model.feed_forward={feed_forward.variant} "
            "cannot be exported: no supported layout has both. Trunks of model=deepseek_*, dense "
            "ones with grouped-query attention and those of Qwen3's and GLM-4.5's mixtures can."
        )
    assert isinstance(attention, GroupedQueryConfig)
    if attention.rotary_dim(trunk) < trunk.d_head:
        raise UserError(
            f"model.attention.d_rope={attention.d_rope} cannot be exported with dense layers: of "
            "the supported layouts only GLM-4.5's rotates a part of each head."
        )
    if attention.qk_norm and attention.qkv_bias:
        raise UserError(
            "model.attention.qk_norm=true with model.attention.qkv_bias=true cannot be exported: "
            "Qwen2's layout has biases, Qwen3's has norms, and no layout has both."
        )
    if attention.qk_norm or attention.qkv_bias:
        return "qwen3" if attention.qk_norm else "qwen2"
    if trunk.d_model % trunk.n_heads:
        raise UserError(
            f"model.d_model={trunk.d_model} cannot be exported with model.n_heads="
            f"{trunk.n_heads}: transformers' Llama needs d_model to be divisible by n_heads."
        )
    return "llama"


def _mixture_type(trunk: TrunkConfig) -> str:
    """The layout of grouped-query attention with experts; empty if there is none."""
    a, e = trunk.attention, trunk.feed_forward
    if type(a) is not GroupedQueryConfig or type(e) is not ExpertsConfig:
        return ""
    if e.scoring == "sigmoid":  # DeepSeek-V3's experts, of which one at least is shared
        return "glm4_moe" if e.n_shared > 0 and e.n_routed // e.n_groups > 1 else ""
    plain = (e.n_shared, e.n_groups, e.scaling, a.qkv_bias) == (0, 1, 1.0, False)
    return "qwen3_moe" if plain and a.qk_norm and a.rotary_dim(trunk) == trunk.d_head else ""


def _check_deepseek(trunk: TrunkConfig) -> None:
    a, e = trunk.attention, trunk.feed_forward
    assert isinstance(a, LatentAttentionConfig)
    eps = trunk.norm_eps if a.norm_eps is None else a.norm_eps
    if eps != LATENT_EPS:
        raise UserError(
            f"norms on the latents with epsilon {eps} cannot be exported: DeepSeek-V3's layout "
            f"has {LATENT_EPS} there (model.attention.norm_eps)."
        )
    if not isinstance(e, ExpertsConfig):
        return
    if e.n_shared == 0:
        raise UserError(
            "model.feed_forward.n_shared=0 cannot be exported: DeepSeek-V3's layout always has a "
            "shared expert."
        )
    if e.scoring != "sigmoid":
        raise UserError(
            f"model.feed_forward.scoring={e.scoring} cannot be exported with latent attention: "
            "DeepSeek-V3's layout has sigmoids."
        )
    if e.n_routed // e.n_groups < 2:
        raise UserError(
            f"model.feed_forward.n_routed={e.n_routed} cannot be exported: DeepSeek-V3's layout "
            "scores a group of experts by its best two."
        )


def to_json(
    config: ModelConfig, *, depth: int, max_positions: int, dtype: str, eot_id: int | None
) -> dict[str, Any]:
    """The content of ``config.json``, for a folder with ``depth`` MTP depths in its layers that
    states ``max_positions`` as its context length."""
    trunk = config.trunk
    kind = model_type(config) if depth else trunk_type(trunk)
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{theirs: getattr(trunk, own) for own, theirs in TRUNK.items() if own != "d_head"},
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rope_parameters": {**rope_type(trunk), "rope_theta": trunk.rope_theta},
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eot_id,
        "pad_token_id": None,
        "use_cache": True,
        "torch_dtype": dtype,
        "num_nextn_predict_layers": depth,
    }
    if trunk.rope_scaling is not None:  # as transformers 4 and servers read it
        fields["rope_scaling"] = rope_type(trunk)
    if kind == "deepseek_v3":
        return fields | _deepseek_fields(trunk, depth)
    fields["head_dim"] = trunk.d_head
    if kind == "glm4_moe":
        return fields | _glm_fields(trunk)
    fields["num_mtp_layers"] = depth
    if kind not in ("qwen2", "mimo"):
        fields["attention_bias"] = False
    if kind == "llama":
        fields["mlp_bias"] = False
    else:
        fields |= {"use_sliding_window": False, "sliding_window": None}
        fields["layer_types"] = ["full_attention"] * trunk.n_layers
        if isinstance(e := trunk.feed_forward, ExpertsConfig):
            fields |= {
                "num_experts": e.n_routed,
                "num_experts_per_tok": e.top_k,
                "moe_intermediate_size": e.d_expert,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "mlp_only_layers": list(range(e.first_k_dense)),
            }
        fields["mtp_layer_types"] = ["full_attention"] * depth
    return fields


def rope_type(trunk: TrunkConfig) -> dict[str, Any]:
    """The scaling of the trunk's rotary frequencies, in transformers' words."""
    scaling = trunk.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    kind = "yarn" if isinstance(scaling, YarnScaling) else "llama3"
    fields = {name: value for name, value in asdict(scaling).items() if value is not None}
    original = fields.pop("original_positions")
    return {"rope_type": kind, **fields, "original_max_position_embeddings": original}


def _deepseek_fields(trunk: TrunkConfig, depth: int) -> dict[str, Any]:
    a, e = trunk.attention, trunk.feed_forward
    assert isinstance(a, LatentAttentionConfig)
    fields: dict[str, Any] = {
        "attention_bias": False,
        **{theirs: getattr(a, own) for own, theirs in LATENT.items()},
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
    }
    if not isinstance(e, ExpertsConfig) or (e.first_k_dense == trunk.n_layers and depth == 0):
        # No layer has experts, but transformers requires the fields.
        e = ExpertsConfig(
            n_routed=2, n_shared=1, top_k=1, d_expert=trunk.d_ff, first_k_dense=trunk.n_layers
        )
    return fields | {theirs: getattr(e, own) for own, theirs in EXPERTS.items()}


def _glm_fields(trunk: TrunkConfig) -> dict[str, Any]:
    a, e = trunk.attention, trunk.feed_forward
    assert isinstance(a, GroupedQueryConfig) and isinstance(e, ExpertsConfig)
    share = rotated_share(a.rotary_dim(trunk), trunk.d_head)
    rope = {**rope_type(trunk), "rope_theta": trunk.rope_theta, "partial_rotary_factor": share}
    return {
        "attention_bias": a.qkv_bias,
        "use_qk_norm": a.qk_norm,
        "partial_rotary_factor": share,
        "rope_parameters": rope,
        "norm_topk_prob": True,
        **{theirs: getattr(e, own) for own, theirs in EXPERTS.items()},
    }


def rotated_share(rotary_dim: int, size: int) -> float:
    """The rotated share of a head's ``size`` dimensions, from which readers get ``rotary_dim`` by
    rounding down, as transformers does."""
    share = rotary_dim / size
    return math.nextafter(share, 1.0) if int(size * share) < rotary_dim else share

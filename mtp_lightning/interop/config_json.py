"""``config.json`` of Hugging Face's folders: written for a model here, and read into one.

Reading takes the fields as data. A field that changes what the model computes, and that has no
switch here, is refused by its name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from mtp_lightning.model import ModelConfig
from mtp_lightning.nn.config import TrunkConfig

log = logging.getLogger(__name__)

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What transformers gives DeepSeek-V3's norms on the latents, whatever rms_norm_eps says.
_LATENT_EPS = 1e-6

# Both names of one number: DeepSeek's, and transformers' for models without a field of their own.
_DEPTHS = ("num_nextn_predict_layers", "num_mtp_layers")


def model_type(trunk: TrunkConfig) -> str:
    """The layout that computes what a trunk does.

    Raises:
        ValueError: there is none.
    """
    if trunk.latent_attention is not None:
        own_eps = trunk.latent_attention.norm_eps
        eps = trunk.norm_eps if own_eps is None else own_eps
        if eps != _LATENT_EPS:
            raise ValueError(
                f"norms on the latents with epsilon {eps} cannot be exported: DeepSeek-V3's layout "
                f"has {_LATENT_EPS} there (model.latent_attention.norm_eps)."
            )
        if trunk.experts is not None and trunk.experts.n_shared == 0:
            raise ValueError(
                "model.experts.n_shared=0 cannot be exported: DeepSeek-V3's layout always has a "
                "shared expert."
            )
        if trunk.experts is not None and trunk.experts.n_routed // trunk.experts.n_groups < 2:
            raise ValueError(
                f"model.experts.n_routed={trunk.experts.n_routed} cannot be exported: "
                "DeepSeek-V3's layout scores a group of experts by its best two."
            )
        return "deepseek_v3"
    if trunk.experts is not None:
        raise ValueError(
            "a mixture of experts with grouped-query attention cannot be exported: no supported "
            "layout has both. Trunks of model=deepseek_* and dense ones can."
        )
    if trunk.qk_norm and trunk.qkv_bias:
        raise ValueError(
            "model.qk_norm=true with model.qkv_bias=true cannot be exported: Qwen2's layout has "
            "the biases, Qwen3's the norms, and none both."
        )
    if trunk.qk_norm or trunk.qkv_bias:
        return "qwen3" if trunk.qk_norm else "qwen2"
    if trunk.d_model % trunk.n_heads:
        raise ValueError(
            f"model.d_model={trunk.d_model} cannot be exported with model.n_heads="
            f"{trunk.n_heads}: transformers' Llama wants the one to be divisible by the other."
        )
    return "llama"


def to_json(
    config: ModelConfig, *, depth: int, max_positions: int, dtype: str, eot_id: int | None
) -> dict[str, Any]:
    """The content of ``config.json``.

    Args:
        config: of the model.
        depth: MTP depths that are in the folder's layers.
        max_positions: the context that the folder promises.
        dtype: of its tensors.
        eot_id: the end-of-text token.
    """
    trunk = config.trunk
    kind = model_type(trunk)
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": trunk.vocab_size,
        "hidden_size": trunk.d_model,
        "intermediate_size": trunk.d_ff,
        "num_hidden_layers": trunk.n_layers,
        "num_attention_heads": trunk.n_heads,
        "num_key_value_heads": trunk.n_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "initializer_range": trunk.init_std,
        "rms_norm_eps": trunk.norm_eps,
        "rope_theta": trunk.rope_theta,
        "rope_parameters": {**_rope_type(trunk), "rope_theta": trunk.rope_theta},
        "tie_word_embeddings": trunk.tie_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eot_id,
        "pad_token_id": None,
        "use_cache": True,
        "torch_dtype": dtype,
        "num_nextn_predict_layers": depth,
    }
    if trunk.rope_scaling is not None:  # as transformers 4 and servers read it
        fields["rope_scaling"] = _rope_type(trunk)
    if kind == "deepseek_v3":
        return fields | _deepseek_fields(trunk, depth)
    fields["head_dim"] = trunk.d_head
    fields["num_mtp_layers"] = depth
    if kind != "qwen2":
        fields["attention_bias"] = False
    if kind == "llama":
        fields["mlp_bias"] = False
    else:
        fields |= {"use_sliding_window": False, "sliding_window": None}
        fields["layer_types"] = ["full_attention"] * trunk.n_layers
        fields["mtp_layer_types"] = ["full_attention"] * depth
    return fields


def _rope_type(trunk: TrunkConfig) -> dict[str, Any]:
    scaling = trunk.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_positions,
    }


def _deepseek_fields(trunk: TrunkConfig, depth: int) -> dict[str, Any]:
    a, e = trunk.latent_attention, trunk.experts
    assert a is not None
    fields: dict[str, Any] = {
        "attention_bias": False,
        "q_lora_rank": a.q_rank,
        "kv_lora_rank": a.kv_rank,
        "qk_nope_head_dim": a.d_nope,
        "qk_rope_head_dim": a.d_rope,
        "v_head_dim": a.d_value,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
    }
    if e is None or (e.first_k_dense == trunk.n_layers and depth == 0):
        # No layer is a mixture; transformers wants the fields all the same.
        return fields | {
            "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1,
            "moe_intermediate_size": trunk.d_ff, "first_k_dense_replace": trunk.n_layers,
            "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        }  # fmt: skip
    return fields | {
        "n_routed_experts": e.n_routed,
        "n_shared_experts": e.n_shared,
        "num_experts_per_tok": e.top_k,
        "moe_intermediate_size": e.d_expert,
        "first_k_dense_replace": e.first_k_dense,
        "n_group": e.n_groups,
        "topk_group": e.top_groups,
        "routed_scaling_factor": e.scaling,
    }


def require_known(fields: Mapping[str, Any], *, source: str) -> None:
    """Refuse a ``config.json`` of a model that cannot be computed here.

    Args:
        fields: its content.
        source: the file, for messages.

    Raises:
        ValueError: another kind of model, or a field that has no switch here.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"{source} has model_type={kind}, which cannot be imported: "
            f"known are {', '.join(ARCHITECTURES)}."
        )
    if "auto_map" in fields:
        log.warning("%s names code of its own (auto_map): it is not executed.", source)
    _refuse_other_maths(fields, kind, source)
    _rope(fields, source)


def from_json(fields: Mapping[str, Any], *, depth: int, source: str) -> TrunkConfig:
    """The trunk that a ``config.json`` describes; :func:`require_known` comes first.

    Args:
        fields: its content.
        depth: MTP layers that the folder holds.
        source: the file, for messages.

    Raises:
        ValueError: a missing field, or sizes that do not fit together.
    """
    kind = fields["model_type"]
    theta, scaling = _rope(fields, source)

    def need(name: str) -> Any:
        if fields.get(name) is None:
            raise ValueError(f"{source} has no {name}: the trunk's shape is not known without it.")
        return fields[name]

    n_heads = need("num_attention_heads")
    shape: dict[str, Any] = {
        "vocab_size": need("vocab_size"),
        "d_model": need("hidden_size"),
        "n_layers": need("num_hidden_layers"),
        "n_heads": n_heads,
        "d_ff": need("intermediate_size"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": float(fields.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": bool(fields.get("tie_word_embeddings", False)),
        "init_std": float(fields.get("initializer_range", 0.02)),
    }
    if kind == "deepseek_v3":
        shape |= _deepseek_shape(fields, need, depth=depth)
    else:
        shape |= {
            "n_kv_heads": _given(fields, "num_key_value_heads", n_heads),
            "d_head": _given(fields, "head_dim", 128 if kind == "qwen3" else None),
            "qkv_bias": kind == "qwen2",
            "qk_norm": kind == "qwen3",
        }
    try:
        return TrunkConfig(**shape)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source} describes no model that can be built: {error}") from error


def declared_depth(fields: Mapping[str, Any]) -> int:
    """MTP layers that a ``config.json`` speaks of; the tensors may be left out all the same."""
    return max(int(fields.get(name) or 0) for name in _DEPTHS)


def _given(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    return default if fields.get(name) is None else fields[name]


def _deepseek_shape(
    fields: Mapping[str, Any], need: Callable[[str], Any], *, depth: int
) -> dict[str, Any]:
    eps = float(fields.get("rms_norm_eps", 1e-6))
    shape: dict[str, Any] = {
        "n_kv_heads": fields["num_attention_heads"],
        "latent_attention": {
            "q_rank": fields.get("q_lora_rank"),
            "kv_rank": need("kv_lora_rank"),
            "d_nope": need("qk_nope_head_dim"),
            "d_rope": need("qk_rope_head_dim"),
            "d_value": need("v_head_dim"),
            "norm_eps": None if eps == _LATENT_EPS else _LATENT_EPS,
        },
    }
    dense = _given(fields, "first_k_dense_replace", 3)
    if dense >= fields["num_hidden_layers"] and depth == 0:
        return shape
    shape["experts"] = {
        "n_routed": need("n_routed_experts"),
        "n_shared": need("n_shared_experts"),
        "top_k": need("num_experts_per_tok"),
        "d_expert": need("moe_intermediate_size"),
        "first_k_dense": min(dense, fields["num_hidden_layers"]),
        "n_groups": need("n_group"),
        "top_groups": need("topk_group"),
        "scaling": float(_given(fields, "routed_scaling_factor", 1.0)),
    }
    return shape


# Fields that change the arithmetic, and the only values that mean what is computed here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "mtp_hidden_states_first": (False, None),
}


def _refuse_other_maths(fields: Mapping[str, Any], kind: str, source: str) -> None:
    for name, allowed in _ONLY.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(
                f"{source} has {name}={fields[name]}, which this project does not compute: "
                f"it can import only {name}={allowed[0]}."
            )
    windowed = kind == "mistral" and fields.get("sliding_window", 4096) is not None
    kinds = set(fields.get("layer_types") or ()) - {"full_attention"}
    if windowed or kinds:
        what = f"layer_types {', '.join(sorted(kinds))}" if kinds else "a sliding_window"
        raise ValueError(f"{source} has {what}: only full attention can be imported.")


def _rope(fields: Mapping[str, Any], source: str) -> tuple[float, dict[str, Any] | None]:
    """Base and stretch of the rotary frequencies, from transformers 5's field or the older two."""
    theta, scaling = fields.get("rope_theta"), None
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if not rope:
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ValueError(
                f"{source} has {name} of type {kind}, which this project does not compute: only "
                "plain rotary positions and those of type llama3 can be imported."
            )
        if rope.get("partial_rotary_factor") not in (None, 1.0):
            raise ValueError(
                f"{source} has {name} with a partial_rotary_factor: only heads that are turned "
                "whole can be imported."
            )
        theta = _given(rope, "rope_theta", theta)
        if kind == "llama3":
            scaling = {
                "factor": rope.get("factor"),
                "low_freq_factor": rope.get("low_freq_factor"),
                "high_freq_factor": rope.get("high_freq_factor"),
                "original_positions": _given(
                    rope,
                    "original_max_position_embeddings",
                    fields.get("max_position_embeddings"),
                ),
            }
    return float(10_000.0 if theta is None else theta), scaling

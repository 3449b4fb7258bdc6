"""Reads ``config.json`` of a Hugging Face folder into a trunk of this project.

Its fields are only data. A field that changes what the model computes but has no switch here is
refused by its name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.interop.config_json import ARCHITECTURES, EXPERTS, LATENT, LATENT_EPS, TRUNK
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.settings import require_whole

log = logging.getLogger(__name__)

# The number of first token ids that the modules were trained to draft; this project alone reads it.
DRAFT_VOCAB = "mtp_draft_vocab"
# Two names of one number: DeepSeek's, and transformers' for models without their own field.
_DEPTHS = ("num_nextn_predict_layers", "num_mtp_layers")
# transformers' values for fields that are missing, and those of single kinds of models.
_DEFAULTS = {
    "head_dim": None, "q_lora_rank": None, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "tie_word_embeddings": False,
}  # fmt: skip
_DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128},
    "deepseek_v3": {
        "num_nextn_predict_layers": 1, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5,
    },
    "glm4_moe": {
        "num_nextn_predict_layers": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0,
        "rms_norm_eps": 1e-5,
    },
}  # fmt: skip


def require_known(fields: Mapping[str, Any], *, source: str) -> None:
    """Refuses the ``config.json`` of a model that this project cannot compute.

    Raises:
        UserError: for another kind of model, or a field that has no switch here.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(
            f"{source} has model_type={kind}, which cannot be imported: "
            f"known are {', '.join(ARCHITECTURES)}."
        )
    if "auto_map" in fields:
        log.warning("%s names its own code (auto_map), which is not executed.", source)
    with _explained(source):
        _refuse_other_maths(fields, source)
        rope_settings(fields, source)
        declared_depth(fields)
        context = max_positions(fields)
        if context < max_positions({**fields, "sliding_window": None}):
            log.warning(
                "%s has a sliding window, and attention is full here: both are the same in texts "
                "up to the window's %s tokens, which become the context.",
                source,
                f"{context:,}",
            )


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Names the file if a field is missing in it, or a value is of another type than its field."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"{source} has no {error.args[0]}: the trunk's shape is unknown without it."
        ) from error
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{source} has a value that its field cannot have: {error}") from error


def from_json(fields: Mapping[str, Any], *, depth: int, source: str) -> TrunkConfig:
    """The trunk that the ``config.json`` of a folder with ``depth`` MTP layers describes, after
    :func:`require_known`.

    Raises:
        UserError: for a missing field, or sizes that do not match.
    """
    with _explained(source):
        shape = _shape(fields, depth, source)
    try:
        return TrunkConfig(**shape)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source} describes no model that can be built: {error}") from error


def _shape(stated: Mapping[str, Any], depth: int, source: str) -> dict[str, Any]:
    kind = stated["model_type"]
    present = {name: value for name, value in stated.items() if value is not None}
    heads = present.get("num_attention_heads")
    defaults = _DEFAULTS | {"num_key_value_heads": heads}
    fields = defaults | _DEFAULTS_OF.get(kind, {}) | present
    fields["rope_theta"], scaling = rope_settings(fields, source)
    shape = {own: fields[theirs] for own, theirs in TRUNK.items()} | {"rope_scaling": scaling}
    casts = {"norm_eps": float, "init_std": float, "tie_embeddings": bool}
    shape |= {name: cast(shape[name]) for name, cast in casts.items()}
    if kind == "deepseek_v3":
        shape |= _deepseek_shape(fields, depth=depth)
    else:
        shape["attention"] = {
            "variant": "grouped_query",
            "qk_norm": kind in ("qwen3", "qwen3_moe"),
            "qkv_bias": kind in ("qwen2", "mimo"),
        }
        if kind == "qwen3_moe":
            shape["feed_forward"] = _mixture(fields, source)
        if kind == "glm4_moe":
            shape["feed_forward"] = _deepseek_experts(fields)
            d_head = _value_or(fields, "head_dim", shape["d_model"] // shape["n_heads"])
            name = "partial_rotary_factor"  # transformers 5 has it in the rotary parameters
            share = _value_or(_rotary(fields)[1], name, stated.get(name, 0.5))
            # As transformers, which rounds down and takes null for the whole head.
            rotary_dim = int(d_head * float(1.0 if share is None else share))
            shape["attention"] |= {
                "qk_norm": bool(fields.get("use_qk_norm")),
                "qkv_bias": bool(fields.get("attention_bias")),
                "d_rope": None if rotary_dim == d_head else rotary_dim,
            }
    return shape


def declared_depth(fields: Mapping[str, Any]) -> int:
    """MTP layers that a ``config.json`` declares; their tensors may be missing."""
    return max(int(fields.get(name) or 0) for name in _DEPTHS)


def read_depth(fields: Mapping[str, Any]) -> int:
    """MTP layers that transformers reads where a folder has their tensors: its default if
    ``config.json`` states no number."""
    return declared_depth(_DEFAULTS_OF.get(fields["model_type"], {}) | {**fields})


def max_positions(fields: Mapping[str, Any]) -> int:
    """The context in tokens that a ``config.json`` promises, at most the window of attention."""
    positions = int(fields.get("max_position_embeddings") or 2048)
    kind = fields["model_type"]
    window = fields.get("sliding_window", 4096 if kind == "mistral" else None)
    # Models like Qwen2 have a window with use_sliding_window=true alone, which is refused. Except
    # for Mistral, layer_types decide instead of a window, and only full attention is imported.
    typed = kind != "mistral" and fields.get("layer_types") is not None
    if window is None or typed or kind in ("qwen2", "mimo", "qwen3", "qwen3_moe"):
        return positions
    return min(positions, require_whole("sliding_window", window, least=1))


def run_config(fields: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The parts of a training's config that the ``config.json`` of ``source`` has.

    Raises:
        UserError: a number is none, or is above the vocabulary.
    """
    config: dict[str, Any] = {"data": {"seq_len": max_positions(fields)}}
    if (draft_vocab := fields.get(DRAFT_VOCAB)) is not None:
        most = int(fields["vocab_size"])
        name = f"{DRAFT_VOCAB} of {source}"
        config["objective"] = {"draft_vocab": require_whole(name, draft_vocab, least=1, most=most)}
    return config


def _value_or(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    return default if fields.get(name) is None else fields[name]


def _deepseek_shape(fields: Mapping[str, Any], *, depth: int) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "n_kv_heads": fields["num_attention_heads"],
        "d_head": None,
        "attention": {
            "variant": "latent",
            **{own: fields[theirs] for own, theirs in LATENT.items()},
            "norm_eps": None if fields["rms_norm_eps"] == LATENT_EPS else LATENT_EPS,
        },
    }
    if fields["first_k_dense_replace"] < fields["num_hidden_layers"] or depth:
        shape["feed_forward"] = _deepseek_experts(fields)
    return shape


def _deepseek_experts(fields: Mapping[str, Any]) -> dict[str, Any]:
    shape = {own: fields[theirs] for own, theirs in EXPERTS.items()}
    shape["first_k_dense"] = min(shape["first_k_dense"], fields["num_hidden_layers"])
    return {"variant": "experts", **shape, "scaling": float(shape["scaling"])}


def _mixture(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The config of Qwen3's experts."""
    dense = list(fields.get("mlp_only_layers") or ())
    if dense != list(range(len(dense))):
        raise UserError(
            f"{source} has mlp_only_layers={dense}: only the first layers can be dense here."
        )
    if "norm_topk_prob" not in fields:  # then it is False in transformers, which is refused
        raise KeyError("norm_topk_prob")
    return {
        "variant": "experts",
        "n_routed": fields.get("num_local_experts") or fields["num_experts"],
        "n_shared": 0,
        "top_k": fields["num_experts_per_tok"],
        "d_expert": fields["moe_intermediate_size"],
        "first_k_dense": len(dense),
        "scoring": "softmax",
        "bias_rate": 0.0,
    }


# Fields that change the arithmetic, and the only values that this project computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "is_causal": (True,),
    "use_sliding_window": (False, None),
    "attention_chunk_size": (None,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "moe_layer_freq": (1,),
    "decoder_sparse_step": (1,),
    "rope_interleave": (True,),
    "partial_rotary_factor": (1.0, None),
    # Of any model in transformers 5: settings of single layers, and of all MTP layers.
    "per_layer_config": (None, {}),
    "mtp_hidden_states_first": (False, None),
    "chain_hidden_post_norm": (None,),
    "logits_mup_width_multiplier": (None,),
    "unpadded_vocab_size": (None,),
}
# The fields of _ONLY that a kind of model has a switch for, or that its class in transformers
# ignores: Qwen2's layers always have biases.
_SWITCHES = {
    "glm4_moe": {"attention_bias", "partial_rotary_factor"},
    "qwen2": {"attention_bias"},
    "mimo": {"attention_bias"},
}


def _refuse_other_maths(fields: Mapping[str, Any], source: str) -> None:
    switches = _SWITCHES.get(fields["model_type"], ())
    for name, allowed in _ONLY.items():
        if name in fields and name not in switches and fields[name] not in allowed:
            raise UserError(
                f"{source} has {name}={str(fields[name])[:40]}, which this project does not "
                f"compute: it can import only {name}={allowed[0]}."
            )
    for name in ("layer_types", "mtp_layer_types"):
        if kinds := ", ".join(sorted(set(fields.get(name) or ()) - {"full_attention"})):
            raise UserError(f"{source} has {name} {kinds}: only full attention can be imported.")


def _rotary(fields: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The name of the field with the rotary parameters, and its content: transformers 4's
    ``rope_scaling`` if it has any, else transformers 5's ``rope_parameters``."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    return name, fields.get(name) or {}


def rope_settings(fields: Mapping[str, Any], source: str) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary frequencies that a ``config.json`` describes."""
    name, rope = _rotary(fields)
    if parts := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        raise UserError(
            f"{source} has {name} by kinds of layers ({', '.join(parts)}): only those of all "
            "layers together can be imported."
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3", "yarn"):
        raise UserError(
            f"{source} has {name} of type {kind}, which this project does not compute: only "
            "plain rotary positions and those of type llama3 or yarn can be imported."
        )
    switches = _SWITCHES.get(fields["model_type"], ())
    rotated_share = rope.get("partial_rotary_factor")
    if rotated_share not in (None, 1.0) and "partial_rotary_factor" not in switches:
        raise UserError(
            f"{source} has {name} with a partial_rotary_factor: heads of "
            f"{fields['model_type']} can only be imported if they are rotated whole."
        )
    # transformers prefers the field, and takes the whole context where both are missing.
    key, positions = "original_max_position_embeddings", fields.get("max_position_embeddings")
    original = _value_or(fields, key, _value_or(rope, key, positions))
    scaling = _yarn(rope, original, positions) if kind == "yarn" else None
    if kind == "llama3":
        if rope.get("mscale_all_dim") and fields["model_type"] == "deepseek_v3":
            raise UserError(
                f"{source} has {name} of type llama3 with mscale_all_dim, by which transformers "
                "scales DeepSeek-V3's attention: it can only be imported with type yarn."
            )
        names = ("factor", "low_freq_factor", "high_freq_factor")
        scaling = {**{name: rope.get(name) for name in names}, "original_positions": original}
    return float(_value_or(rope, "rope_theta", _value_or(fields, "rope_theta", 10_000.0))), scaling


def _yarn(rope: Mapping[str, Any], original: Any, positions: Any) -> dict[str, Any]:
    optional = ("mscale", "mscale_all_dim", "attention_factor")
    return {
        "factor": _value_or(rope, "factor", positions / original if positions else None),
        "original_positions": original,
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        **{name: rope[name] for name in optional if rope.get(name) is not None},
        "truncate": bool(rope.get("truncate", True)),  # null is false in transformers
    }

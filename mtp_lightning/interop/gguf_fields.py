"""The description of a model in a GGUF file: llama.cpp's keys, written and read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np

from mtp_lightning.errors import UserError
from mtp_lightning.interop.config_json import EXPERTS, LATENT, TRUNK, rotated_share, trunk_type
from mtp_lightning.interop.config_reading import DRAFT_VOCAB
from mtp_lightning.interop.gguf_layout import DRAFTING, PLAIN, Layout
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig

# The layout of the trunk, where the architecture alone does not tell it.
LAYERS = "mtp_lightning.trunk"
# The spread of new modules' matrices, which llama.cpp has no key for.
SPREAD = "mtp_lightning.initializer_range"
# The number of first token ids that the module was trained to draft; llama.cpp drafts from all.
DRAFTED = "mtp_lightning.draft_vocab"
# llama.cpp's keys for the settings of a trunk, of latent attention and of experts.
_TRUNK = {
    "d_model": "embedding_length",
    "d_ff": "feed_forward_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "d_head": "attention.key_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_LATENT = {
    "q_rank": "attention.q_lora_rank",
    "kv_rank": "attention.kv_lora_rank",
    "d_rope": "rope.dimension_count",
    "d_value": "attention.value_length_mla",
}
_EXPERTS = {
    "first_k_dense": "leading_dense_block_count",
    "n_routed": "expert_count",
    "top_k": "expert_used_count",
    "n_shared": "expert_shared_count",
    "d_expert": "expert_feed_forward_length",
    "scaling": "expert_weights_scale",
    "n_groups": "expert_group_count",
    "top_groups": "expert_group_used_count",
}
# Keys whose values may be fractional.
_DECIMAL = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "expert_weights_scale")
# Keys of what llama.cpp computes and this project does not, with their values that change nothing:
# factors of the queries that grow with the position, and groups of Qwen3's experts.
_ONLY: dict[str, tuple[int, ...]] = {
    "deepseek2.attention.temperature_scale": (0,),
    "qwen3moe.expert_group_count": (0, 1),
}
_SOFTMAX, _SIGMOID = 1, 2
Value = int | float | bool


def to_fields(layout: Layout, *, max_positions: int) -> dict[str, Value]:
    """The values of ``ARCH.KEY`` by ``KEY``; ``max_positions`` is the context length that the file
    states."""
    trunk, depth = layout.config.trunk, layout.config.mtp.depth
    a = trunk.attention
    fields = trunk_fields(trunk, n_layers=trunk.n_layers + depth, max_positions=max_positions)
    if isinstance(a, LatentAttentionConfig):
        fields |= {
            # llama.cpp computes with one head of keys, the latent with the rotary part.
            "attention.head_count_kv": 1,
            "attention.key_length": a.d_cached,
            "attention.value_length": a.kv_rank,
            "attention.key_length_mla": a.d_head,
            **_values(_LATENT, a),
        }
    if depth:
        fields["nextn_predict_layers"] = depth
    if layout.arch in ("glm4moe", "deepseek2", "qwen3moe"):
        e = layout.experts
        fields |= _values(_EXPERTS, e)
        fields["expert_weights_norm"] = True
        fields["expert_gating_func"] = _SIGMOID if e.scoring == "sigmoid" else _SOFTMAX
        if e.top_groups == e.n_groups:
            del fields["expert_group_count"], fields["expert_group_used_count"]
    return fields


def trunk_fields(trunk: TrunkConfig, *, n_layers: int, max_positions: int) -> dict[str, Any]:
    """The values that every architecture has, for a model of blocks like the trunk's."""
    return {
        "block_count": n_layers,
        "context_length": max_positions,
        "vocab_size": trunk.vocab_size,
        **_values(_TRUNK, trunk),
        "attention.value_length": trunk.d_head,
        "rope.dimension_count": trunk.attention.rotary_dim(trunk),
    }


def _values(keys: Mapping[str, str], config: Any) -> dict[str, Value]:
    values = {key: getattr(config, own) or 0 for own, key in keys.items()}
    return {key: float(value) if key in _DECIMAL else value for key, value in values.items()}


def own_fields(layout: Layout, draft_vocab: int | None) -> dict[str, Any]:
    """The values of this project's own keys."""
    trunk = layout.config.trunk
    dense = "" if isinstance(trunk.feed_forward, ExpertsConfig) else " dense"
    fields = {LAYERS: trunk_type(trunk) + dense, SPREAD: float(trunk.init_std)}
    has_drafted = draft_vocab is not None and layout.config.mtp.depth
    return {**fields, DRAFTED: draft_vocab} if has_drafted else fields


def to_json(
    get: Callable[[str], Any], tensors: Collection[str], *, source: str
) -> tuple[dict[str, Any], bool]:
    """The fields of a config.json, and whether a mixture in the module stands for a dense layer.
    ``get`` returns the content of a key of the file; None if it is not there.

    Raises:
        UserError: an architecture or a key that is not read, or a key that is missing.
    """
    arch, kind, dense = _architecture(get, source)
    for key, neutral in _ONLY.items():
        if (value := get(key)) is not None and value not in neutral:
            raise UserError(
                f"{source} has {key}={str(value)[:40]}, which this project does not compute: it "
                f"can import only {key}={neutral[0]}."
            )
    sections = get("glm4moe.rope.dimension_sections")
    if sections and (not isinstance(sections, list) or any(sections[3:])):
        raise UserError(
            f"{source} has glm4moe.rope.dimension_sections={str(sections)[:40]}, which this "
            "project does not compute: the fourth number, of dimensions that llama.cpp does not "
            "rotate in a text, must be 0."
        )
    need = partial(_count, get, arch, source)
    depth, heads = need("nextn_predict_layers", 0), need("attention.head_count")
    size = need("embedding_length") // max(heads, 1)
    defaults = {"n_kv_heads": heads, "d_head": size, "rope_theta": 10_000.0}
    fields: dict[str, Any] = {
        "model_type": kind,
        "num_hidden_layers": need("block_count") - depth,
        **{TRUNK[own]: need(key, defaults.get(own)) for own, key in _TRUNK.items()},
        "max_position_embeddings": need("context_length", 2048),
        "tie_word_embeddings": "output.weight" not in tensors,
        "num_nextn_predict_layers": depth,
        "is_causal": need("attention.causal", True),
        DRAFT_VOCAB: get(DRAFTED),
    }
    if isinstance(spread := get(SPREAD), float):
        fields["initializer_range"] = decimal(spread)
    if kind == "deepseek_v3":
        fields |= _latent_json(need)
    else:
        size = fields["head_dim"]
        rotary_dim = need("rope.dimension_count", size)
        fields["partial_rotary_factor"] = rotated_share(rotary_dim, max(size, 1))
    if kind == "glm4_moe":
        fields["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
        fields["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if kind in ("glm4_moe", "deepseek_v3", "qwen3_moe"):
        fields |= _experts_json(need, kind)
    return fields, dense


def _architecture(get: Callable[[str], Any], source: str) -> tuple[str, str, bool]:
    """llama.cpp's architecture, the layout of the trunk, and whether its layers are dense though
    the architecture has mixtures."""
    arch = get("general.architecture")
    if arch not in PLAIN.values():
        raise UserError(
            f"{source} has the architecture {arch}, which cannot be imported: known are "
            f"{', '.join(dict.fromkeys(PLAIN.values()))}."
        )
    own = {theirs: ours for ours, theirs in PLAIN.items() if ours != "mistral"}
    kind, _, dense = str(get(LAYERS) or own[arch]).partition(" ")
    if arch not in (PLAIN.get(kind), DRAFTING.get(kind)):
        raise UserError(
            f"{source} is damaged: {LAYERS} does not belong to the architecture {arch}."
        )
    return arch, kind, bool(dense)


def _count(get: Callable[[str], Any], arch: str, source: str, key: str, default: Any = None) -> Any:
    """The value of ``ARCH.KEY``: a count, or a fraction for a key of :data:`_DECIMAL`. The key must
    be there unless there is a default."""
    value = get(f"{arch}.{key}")
    if value is None and default is None:
        raise UserError(f"{source} has no {arch}.{key}: the trunk's shape is unknown.")
    value = default if value is None else value
    if isinstance(value, float) and key in _DECIMAL:
        return decimal(value)
    if not isinstance(value, int) or value < 0:
        raise UserError(f"{source} has {arch}.{key}={str(value)[:40]}, which is not a count.")
    return value


def decimal(stored: float) -> float:
    """A number stored in 4 bytes: the shortest decimal that gives these bytes was meant."""
    return float(str(np.float32(stored)))


def _latent_json(need: Callable[..., Any]) -> dict[str, Any]:
    defaults = {"q_rank": 0}
    fields = {LATENT[own]: need(key, defaults.get(own)) for own, key in _LATENT.items()}
    unturned = need("attention.key_length_mla") - fields["qk_rope_head_dim"]
    return fields | {"qk_nope_head_dim": unturned, "q_lora_rank": fields["q_lora_rank"] or None}


def _experts_json(need: Callable[..., Any], kind: str) -> dict[str, Any]:
    # llama.cpp's default of these is 0, which leaves them out.
    defaults: dict[str, Any] = {"first_k_dense": 0, "n_shared": 0, "scaling": 1.0, "n_groups": 1}
    defaults["top_groups"] = need(_EXPERTS["n_groups"], 0) or 1
    fields = {
        EXPERTS[own]: need(key, defaults.get(own)) or defaults.get(own, 0)
        for own, key in _EXPERTS.items()
    }
    # llama.cpp divides by the weights' sum only where the file says so, and always for qwen3moe.
    fields["norm_topk_prob"] = bool(need("expert_weights_norm", kind == "qwen3_moe"))
    if kind == "qwen3_moe":
        # A list of a forged number could take all memory, before the number is checked.
        dense = range(fields["first_k_dense_replace"])
        return fields | {"num_experts": fields["n_routed_experts"], "mlp_only_layers": dense}
    # llama.cpp takes softmax where an old file of deepseek2 does not say it.
    gating = need("expert_gating_func", 0) or (_SIGMOID if kind == "glm4_moe" else _SOFTMAX)
    fields["scoring_func"] = "sigmoid" if gating == _SIGMOID else f"number {gating}"
    return fields

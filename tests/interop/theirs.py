"""Small random models that transformers builds and saves."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from tests.interop import folders

INSTALLED = importlib.util.find_spec("transformers") is not None
transformers = importlib.import_module("transformers") if INSTALLED else None

SIZES = {
    "vocab_size": folders.ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "rms_norm_eps": 1e-5,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
YARN = {
    "rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
DEEPSEEK = {
    **SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "n_shared_experts": 1, "kv_lora_rank": 10, "q_lora_rank": 12, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "qk_nope_head_dim": 8, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.0,
}  # fmt: skip
# GLM-4.5 has biases and norms on heads, half of which is rotated; GLM-4.5-Air has no norms.
GLM = {
    **SIZES, "head_dim": 16, "partial_rotary_factor": 0.5, "attention_bias": True,
    "use_qk_norm": True, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
QWEN3_MOE = {
    "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
    "norm_topk_prob": True, "mlp_only_layers": [0],
}  # fmt: skip


def rope(**changes: Any) -> dict[str, Any]:
    """YaRN's stretched positions, with changes."""
    return {"rope_parameters": {**YARN, **changes}}


# Interpolated between the second dimension and the third: null is false here.
LONGER = rope(
    attention_factor=1.3, beta_fast=4, truncate=None, original_max_position_embeddings=256
)
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZES, **ROPE}),
    "llama-tied": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "llama-wide-heads": ("Llama", {**SIZES, "head_dim": 16}),
    "llama3": ("Llama", {**SIZES, "rope_parameters": LLAMA3}),
    "yarn": ("Llama", {**SIZES, "max_position_embeddings": 64, **rope()}),
    "qwen3-yarn": ("Qwen3", {**SIZES, "head_dim": 16, **LONGER}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": None}),
    "qwen2": ("Qwen2", {**SIZES, **ROPE}),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {**SIZES, **QWEN3_MOE}),
    "deepseek": ("DeepseekV3", DEEPSEEK),
    "deepseek-v2-queries": ("DeepseekV3", {**DEEPSEEK, "q_lora_rank": None, **ROPE}),
    "deepseek-yarn": ("DeepseekV3", {**DEEPSEEK, **rope(mscale=1.0, mscale_all_dim=0.7)}),
    "glm4_moe": ("Glm4Moe", GLM),
    "glm4_moe-air": ("Glm4Moe", {**GLM, "use_qk_norm": False, "n_group": 4, "topk_group": 2}),
    "glm4_moe-plain": ("Glm4Moe", {**GLM, "attention_bias": False, "partial_rotary_factor": 1.0}),
    "glm4_moe-narrow": ("Glm4Moe", {**GLM, "head_dim": 20, "partial_rotary_factor": 0.4}),
    "glm4_moe-yarn": ("Glm4Moe", {**GLM, **rope(partial_rotary_factor=0.5)}),
    "deepseek-dense": ("DeepseekV3", {**DEEPSEEK, "first_k_dense_replace": 3}),
}


def save(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **saving: Any) -> Any:
    """A random model, saved by transformers, with gains and biases that are not trivial."""
    kind, fields = THEIRS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name_, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() > 1:
                tensor.normal_(0, 0.1)
            elif name_.endswith("bias"):
                tensor.normal_(0, 0.2)
            elif not name_.endswith("inv_freq"):
                tensor.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder, **saving)
    return model.float()

"""Parity with transformers on tiny random weights; its environment is an extra."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.config import TrunkConfig
from tests import deepseek

# transformers imports optional packages that warn; none of that is this project's.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.extras]

DEEPSEEK_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.q_a_proj": "attention.query_down",
    "self_attn.q_a_layernorm": "attention.query_norm",
    "self_attn.q_b_proj": "attention.query_up",
    "self_attn.kv_a_proj_with_mqa": "attention.kv_down",
    "self_attn.kv_a_layernorm": "attention.kv_norm",
    "self_attn.kv_b_proj": "attention.kv_up",
    "self_attn.o_proj": "attention.out",
    "mlp.gate": "feed_forward.router",
    "mlp.experts.gate_up_proj": "feed_forward.experts.gate_up",
    "mlp.experts.down_proj": "feed_forward.experts.down",
}


@pytest.fixture
def transformers() -> Any:
    reason = "parity with transformers needs it: pip install transformers"
    return pytest.importorskip("transformers", reason=reason)


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
    return model.eval()


def load(model: MTPModel, hf: torch.nn.Module, block_names: dict[str, str]) -> MTPModel:
    """Every weight of ``hf`` into its place, none left over on either side."""
    state = dict(hf.state_dict())
    own = {
        "trunk.embedding.weight": state.pop("model.embed_tokens.weight"),
        "trunk.norm.weight": state.pop("model.norm.weight"),
        "head.weight": state.pop("lm_head.weight"),
    }
    for layer in range(model.config.trunk.n_layers):
        prefix, place = f"model.layers.{layer}.", f"trunk.blocks.{layer}."
        block = {k.removeprefix(prefix): state.pop(k) for k in list(state) if k.startswith(prefix)}
        for hf_mlp, mlp in (
            ("mlp.", "feed_forward."),
            ("mlp.shared_experts.", "feed_forward.shared."),
        ):
            if f"{hf_mlp}gate_proj.weight" in block:
                parts = [block.pop(f"{hf_mlp}{n}_proj.weight") for n in ("gate", "up")]
                own[f"{place}{mlp}gate_up.weight"] = torch.cat(parts)
                own[f"{place}{mlp}down.weight"] = block.pop(f"{hf_mlp}down_proj.weight")
        if "self_attn.k_proj.weight" in block:
            qkv = [block.pop(f"self_attn.{n}_proj.weight") for n in "qkv"]
            own[f"{place}attention.qkv.weight"] = torch.cat(qkv)
        for name, tensor in block.items():
            if name == "mlp.gate.e_score_correction_bias":
                own[f"{place}feed_forward.router.expert_bias"] = tensor
            elif name in block_names:
                own[place + block_names[name]] = tensor
            else:
                stem, _, leaf = name.rpartition(".")
                own[f"{place}{block_names[stem]}.{leaf}"] = tensor
    assert not state
    model.load_state_dict(own)
    return model.eval()


@pytest.mark.parametrize("q_rank", [12, None])
@pytest.mark.parametrize("n_shared", [1, 2])
def test_deepseek_v3(transformers: Any, q_rank: int | None, n_shared: int) -> None:
    trunk = deepseek.trunk(
        latent={"q_rank": q_rank}, experts={"n_shared": n_shared}, tie_embeddings=False
    )
    a, e = trunk.attention, trunk.feed_forward
    assert a is not None and e is not None
    config = transformers.DeepseekV3Config(
        vocab_size=37, hidden_size=32, intermediate_size=48, moe_intermediate_size=e.d_expert,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        n_shared_experts=n_shared, n_routed_experts=8, routed_scaling_factor=2.5,
        kv_lora_rank=a.kv_rank, q_lora_rank=q_rank, qk_rope_head_dim=a.d_rope,
        v_head_dim=a.d_value, qk_nope_head_dim=a.d_nope, n_group=4, topk_group=2,
        num_experts_per_tok=2, first_k_dense_replace=1, norm_topk_prob=True,
        rope_interleave=True, num_mtp_layers=0, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    compare(transformers.DeepseekV3ForCausalLM(config), trunk, DEEPSEEK_NAMES)


def test_qwen3_for_qk_norm(transformers: Any) -> None:
    trunk = TrunkConfig(
        vocab_size=37, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48,
        tie_embeddings=False, attention=GroupedQueryConfig(qk_norm=True),
    )  # fmt: skip
    config = transformers.Qwen3Config(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    names = {
        **DEEPSEEK_NAMES,
        "self_attn.q_norm": "attention.query_norm",
        "self_attn.k_norm": "attention.key_norm",
    }
    compare(transformers.Qwen3ForCausalLM(config), trunk, names)


def compare(hf: torch.nn.Module, trunk: TrunkConfig, names: dict[str, str]) -> None:
    hf = perturbed(hf)
    model = load(MTPModel(ModelConfig(trunk=trunk, mtp=NoMTPConfig())), hf, names)
    tokens = torch.randint(0, 37, (2, 41))
    with torch.no_grad():
        expected = hf(tokens[:, :40]).logits
        found = model.head(model(WindowBatch(tokens, 0))[0])
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

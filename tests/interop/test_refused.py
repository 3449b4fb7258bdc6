"""Folders that are refused: unsupported arithmetic, tensors that do not fit, code."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.errors import UserError
from mtp_lightning.interop import config_reading, stack_file, tensor_files
from mtp_lightning.interop.tensor_files import INDEX
from mtp_lightning.opening import open_model
from tests import deepseek
from tests.interop import folders
from tests.interop.folders import read_folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folders.write(tmp_path / "llama", deepseek.build(folders.dense(), depth=1))
    return tmp_path / "llama"


# Each is refused by the name of its first field.
UNSUPPORTED: list[dict[str, Any]] = [
    {"hidden_act": "gelu"},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"is_causal": False},
    {"rope_scaling": {"type": "linear", "factor": 40}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"use_sliding_window": True},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"mtp_layer_types": ["sliding_attention"]},
    {"logits_mup_width_multiplier": 2.0},
    {"unpadded_vocab_size": 200},
    {"chain_hidden_post_norm": True},
    {"per_layer_config": {"1": {"hidden_act": "gelu"}}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
    {"sliding_window": 0, "model_type": "mistral"},
    {"sliding_window": "x", "model_type": "mistral"},
    {"attention_chunk_size": 8},
    {"quantization_config": {"quant_method": "fp8"}},
    {"quantization_config": {"quant_method": "gptq", "weight_block_size": [128, 128]}},
    {"model_type": "gpt2"},
    {"model_type": ["llama"]},
    {"hidden_size": None},
]
WRONG_TYPES: list[dict[str, Any]] = [
    {"rms_norm_eps": "x"},
    {"initializer_range": []},
    {"num_nextn_predict_layers": "x"},
    {"max_position_embeddings": "x"},
    {"rope_scaling": [1]},
    {"rope_theta": "x", "rope_parameters": None},
    {"rope_theta": 10**400, "rope_parameters": None},
    {"layer_types": 3},
    {"num_attention_heads": 0, "head_dim": None},
]
NO_MTP = {"num_nextn_predict_layers": None}
SIZES: list[dict[str, Any]] = [
    {"vocab_size": 10**12, **NO_MTP},
    {"num_hidden_layers": 10**9, **NO_MTP},
    {"intermediate_size": 10**11, **NO_MTP},
]
CASES = [
    *((changes, next(iter(changes))) for changes in UNSUPPORTED),
    *((changes, r"config\.json ") for changes in WRONG_TYPES),
    ({"quantization_config": {"bits": "4" * 300, "quant_method": "gptq"}}, "'gptq'"),
    *((changes, "is damaged or forged: its config asks for") for changes in SIZES),
    ({"num_key_value_heads": 3, **NO_MTP}, "config.json describes no model.*n_kv_heads=3"),
]


@pytest.mark.parametrize(
    ("changes", "message"), CASES, ids=[next(iter(changes)) for changes, _ in CASES]
)
def test_unsupported_config_values_are_refused(
    llama: Path, changes: dict[str, Any], message: str
) -> None:
    folders.change_config(llama, **changes)
    with pytest.raises(UserError, match=message):
        read_folder(llama)


def test_rounding_of_float64_is_reported(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders.merge(llama, set_to("model.norm.weight", lambda t: t.double()))
    read_folder(llama)
    file = llama / "model.safetensors"
    assert caplog.messages == [f"{file}: float64 is rounded to float32 in 1 tensor."]


def test_null_fields_have_their_defaults(llama: Path) -> None:
    folders.change_json(llama / "config.json", rms_norm_eps=None, initializer_range=None)
    trunk = read_folder(llama).config.trunk
    assert (trunk.norm_eps, trunk.init_std) == (1e-6, 0.02)


def test_attention_bias_of_a_qwen2_config_is_ignored(tmp_path: Path) -> None:
    folders.write(tmp_path, deepseek.build(folders.TRUNKS["qwen2"], depth=1))
    folders.change_config(tmp_path, attention_bias=True)
    assert read_folder(tmp_path).config.trunk.attention == folders.TRUNKS["qwen2"].attention


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, dtype: str) -> None:
    model = deepseek.build(folders.dense(), depth=1)
    with torch.no_grad():
        model.mtp.depths[0].eh_proj.weight[1, 2] = float("nan")
    folders.write(tmp_path / "folder", model, dtype=dtype)
    with pytest.raises(UserError, match="folder holds NaN or infinity in mtp.depths.0.eh_proj.wei"):
        open_model(tmp_path / "folder")


MIXTURES: dict[str, list[dict[str, Any]]] = {
    "deepseek": [
        {"scoring_func": "softmax"}, {"topk_method": "greedy"}, {"norm_topk_prob": False},
        {"rope_interleave": False}, {"moe_layer_freq": 2}, {"kv_lora_rank": None},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "mscale_all_dim": 1.0}},
    ],
    "glm4_moe": [{"norm_topk_prob": False}, {"hidden_act": "gelu"}, {"n_group": None}],
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_unsupported_mixtures_are_refused_by_name(name: str, tmp_path: Path) -> None:
    folders.write(tmp_path, deepseek.build(folders.TRUNKS[name], depth=1))
    fields = (tmp_path / "config.json").read_text()
    for changes in MIXTURES[name]:
        (tmp_path / "config.json").write_text(fields)
        folders.change_config(tmp_path, **changes)
        with pytest.raises(ValueError, match=next(iter(changes))):
            read_folder(tmp_path)


def set_to(name: str, value: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
         "model.layers.1.self_attn.k_proj.weight is missing"),
        (lambda t: t.pop("model.layers.2.eh_proj.weight"), "layers.2.eh_proj.weight is missing"),
        # without the copies of the embedding, fewer numbers than the model has
        (lambda t: [t.pop(f"model.{n}.weight") for n in
                    ("layers.2.embed_tokens", "layers.2.shared_head.head", "layers.1.mlp.up_proj")],
         "match its config.json: model.layers.1.mlp.up_proj.weight is missing"),
        (set_to("model.layers.0.self_attn.q_proj.bias", torch.ones(32)),
         "model.layers.0.self_attn.q_proj.bias is unknown"),
        (set_to("model.layers.3.enorm.weight", torch.ones(32)), "layers.3.enorm.weight is unknown"),
        (set_to("model.norm.weight", torch.ones(16)),
         r"model.norm.weight has the shape \[16\] where \[32\] is needed"),
        (set_to("model.layers.2.embed_tokens.weight", lambda t: t + 1),
         "model.layers.2.embed_tokens.weight in .* differs from the trunk's"),
        (set_to("lm_head.weight", torch.ones(folders.ROWS, 32)),
         "lm_head.weight in .* differs from .* tie_word_embeddings=true makes them one"),
        (set_to("model.norm.weight", torch.ones(32, dtype=torch.int8)),
         "model.norm.weight in .* is stored as int8"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(llama: Path, change: Any, message: str) -> None:
    folders.merge(llama, change)
    with pytest.raises(ValueError, match=message):
        read_folder(llama)


def test_copies_of_shared_tensors_and_the_index_are_optional(llama: Path) -> None:
    """So are the rotary tables of old checkpoints."""
    expected = read_folder(llama).weights

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.2.embed_tokens.weight"]
        del tensors["model.layers.2.shared_head.head.weight"]
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    folders.merge(llama, change)
    weights = read_folder(llama).weights
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_mtp_layers_that_the_config_declares_are_optional(tmp_path: Path) -> None:
    """transformers saves DeepSeek-V3 as the trunk alone, with a config that declares a layer."""
    folders.write(tmp_path, deepseek.build(folders.TRUNKS["deepseek"], depth=1))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    folders.merge(tmp_path, change)
    folder = read_folder(tmp_path)
    assert folder.config.mtp.variant == "none"
    folder.build()


@pytest.mark.parametrize("kind", ["deepseek", "glm4_moe"])
def test_mtp_layers_that_the_config_does_not_count_are_read(kind: str, tmp_path: Path) -> None:
    """transformers' configs of these kinds have one MTP layer where the file states no number."""
    model = deepseek.build(folders.TRUNKS[kind], depth=1)
    folders.write(tmp_path, model)
    fields = tensor_files.read_json(tmp_path / "config.json")
    del fields["num_nextn_predict_layers"]
    assert config_reading.read_depth(fields) == 1
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_folder(tmp_path).config.mtp == model.config.mtp


class Bomb:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_not_opened(llama: Path, tmp_path: Path) -> None:
    for file in llama.glob("model*"):
        file.unlink()
    with (llama / "pytorch_model.bin").open("wb") as out:
        pickle.dump(Bomb(tmp_path / "exploded"), out)
    with pytest.raises(ValueError, match=r"pytorch_model.bin.*convert them to safetensors"):
        read_folder(llama)
    assert not (tmp_path / "exploded").exists()


def test_code_of_the_folder_is_reported_and_not_executed(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders.change_config(llama, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (llama / "modeling.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    read_folder(llama)
    assert "auto_map" in caplog.text and "not executed" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../outside.safetensors", "only safetensors files of the folder itself"),
        ("/etc/passwd", "only safetensors files of the folder itself"),
        ("model.bin", "only safetensors files of the folder itself"),
        (None, "model.norm.weight is only in the file"),
    ],
)
def test_an_index_that_leaves_the_folder_or_disagrees_is_refused(
    llama: Path, file: str | None, message: str
) -> None:
    index = json.loads((llama / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    if file is not None:
        index["weight_map"]["model.norm.weight"] = file
    (llama / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        read_folder(llama)


def test_damaged_files_are_named(llama: Path) -> None:
    shard = sorted(llama.glob("model-*"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        read_folder(llama)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        read_folder(llama)
    (llama / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        read_folder(llama)
    (llama / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json holds no JSON object"):
        read_folder(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        read_folder(llama)


def test_a_tokenizer_of_more_ids_than_the_model_is_refused(llama: Path) -> None:
    """Fine-tuned models have such added tokens, which nobody gave a row of the embedding."""
    file = llama / "tokenizer.json"
    content = json.loads(file.read_text())
    first = content["added_tokens"][0]
    content["added_tokens"] += [{**first, "id": i, "content": f"[{i}]"} for i in range(257, 265)]
    file.write_text(json.dumps(content))
    message = r"llama has 265 ids, and the model 264: in a folder, .* out of tokenizer.json"
    with pytest.raises(UserError, match=message):
        _ = open_model(llama).tokenizer


@pytest.mark.parametrize(
    "metadata",
    [{}, {"mtp_lightning": "{"}, {"mtp_lightning": '{"variant": "os.system", "depth": 1}'},
     {"mtp_lightning": '{"variant": "linear", "depth": 1, "_target_": "os.system"}'},
     {"mtp_lightning": "[1]"}],
)  # fmt: skip
def test_heads_of_an_unknown_kind_are_refused(llama: Path, metadata: dict[str, str]) -> None:
    tensor_files.write(llama / stack_file.FILE, {"mtp.depths.0.weight": torch.ones(2, 2)}, metadata)
    with pytest.raises(ValueError, match=r"mtp_heads.safetensors does not describe.*[^.]\.$"):
        read_folder(llama)


def test_heads_that_would_replace_a_tensor_of_the_trunk_are_refused(llama: Path) -> None:
    metadata = {"mtp_lightning": '{"variant": "none"}'}
    tensor_files.write(llama / stack_file.FILE, {"trunk.norm.weight": torch.ones(32)}, metadata)
    with pytest.raises(UserError, match="its tensors: trunk.norm.weight belongs to the trunk"):
        read_folder(llama)

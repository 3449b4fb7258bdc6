"""A model written and read is the same model, and written again the same bytes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_modules.tokenizers import ByteTokenizer, PretrainedTokenizer
from mtp_lightning.interop import conversion, eagle3, stack_file
from mtp_lightning.interop.config_json import to_json
from mtp_lightning.interop.config_reading import from_json
from mtp_lightning.interop.tensor_files import CONFIG, read_json
from mtp_lightning.interop.writing import Contents
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from tests import deepseek, models
from tests.interop import folders
from tests.interop.folders import Folder, read_folder


def round_trip(
    model: MTPModel, path: Path, *, dtype: str = "float32", tolerance: float = 0.0
) -> tuple[Contents, Folder]:
    """Writes ``path/one`` and reads it, compares the logits if nothing is rounded, and writes the
    same bytes again as ``path/two``."""
    contents = folders.write(path / "one", model, dtype=dtype)
    folder = read_folder(path / "one")
    built = folder.build()
    if dtype == "float32":
        for logits, expected in zip(folders.logits(built), folders.logits(model), strict=True):
            torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    folders.write(path / "two", built, PretrainedTokenizer(str(path / "one")), dtype=dtype)
    assert folders.files(path / "one") == folders.files(path / "two")
    return contents, folder


@pytest.mark.parametrize(
    ("name", "depth"), [*((name, 2) for name in folders.TRUNKS), ("llama", 0), ("deepseek", 0)]
)
def test_every_layout_is_read_back_and_written_again(name: str, depth: int, tmp_path: Path) -> None:
    model = deepseek.build(folders.TRUNKS[name], depth=depth).eval()
    contents, folder = round_trip(model, tmp_path)
    assert contents.modules == depth and not contents.heads and contents.shards > 1
    assert folder.config.mtp.depth == depth


def test_a_single_file_takes_precedence_over_an_index(tmp_path: Path) -> None:
    """As in transformers, which leaves the old shards and their index when it saves a folder."""
    old, new = (deepseek.build(folders.TRUNKS["llama"], depth=0, seed=seed) for seed in (0, 1))
    for name, model in (("old", old), ("new", new)):
        folders.write(tmp_path / name, model, ByteTokenizer(), shard_bytes=10**9)
    (shard,) = (tmp_path / "new").glob("model-*.safetensors")
    shutil.copy(shard, tmp_path / "old" / "model.safetensors")
    weights = read_folder(tmp_path / "old").weights
    assert all(torch.equal(weights[name], t) for name, t in new.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_are_rounded_once(dtype: str, tmp_path: Path) -> None:
    model = deepseek.build(folders.TRUNKS["deepseek"], depth=1)
    _, folder = round_trip(model, tmp_path, dtype=dtype)
    for name, tensor in model.state_dict().items():
        weight = folder.weights[name]
        assert weight.dtype == torch.float32
        if name.endswith("expert_bias"):
            assert torch.equal(weight, tensor), "biases move by 0.001: they stay precise"
        else:
            assert torch.equal(weight, tensor.to(getattr(torch, dtype)).float()), name


@pytest.mark.parametrize(
    ("name", "switch"),
    [("llama", {"share_layers": True}), ("deepseek", {"concat": "hidden_first"})],
)
def test_shared_and_hidden_first_modules_are_converted(
    name: str, switch: dict[str, Any], tmp_path: Path
) -> None:
    model = deepseek.build(folders.TRUNKS[name], depth=2, **switch).eval()
    contents, folder = round_trip(model, tmp_path, tolerance=1e-5)
    assert contents.modules == 2
    assert folder.config.to_dict()["mtp"] | switch != folder.config.to_dict()["mtp"]


@pytest.mark.parametrize(
    ("variant", "mtp"),
    [
        ("linear", {"branch": "before_last"}),
        ("sequential", {"input_norm": "pre"}),  # on a trunk that is not Qwen2's
        ("joint", {}),
        ("nextlat", {"branch": "before_last"}),
        ("parallel", {"correction": "markov", "correction_rank": 5}),
        ("linear", {"correction": "selector", "correction_rank": 5}),
        ("masked", {"lora_rank": 3}),
        ("dflash", {"blocks": 2}),
        # Servers read states in ascending order, each once, and none after the last block.
        *(("eagle", {"layers": layers}) for layers in ((0, 1, 2), (1, 0, 1), (0, 0, 1))),
    ],
)
def test_heads_without_a_layout_are_in_a_separate_file(
    variant: str, mtp: dict[str, Any], tmp_path: Path
) -> None:
    model = models.build(folders.DENSE, variant, depth=2, **mtp).eval()
    contents, folder = round_trip(model, tmp_path)
    assert contents.heads and contents.modules == 0
    assert read_json(tmp_path / "one" / CONFIG)["num_nextn_predict_layers"] == 0
    assert (tmp_path / "one" / stack_file.FILE).is_file()
    assert not (tmp_path / "one" / eagle3.FOLDER).exists()
    assert "mtp_heads.safetensors" not in folders.index_of(tmp_path / "one").values()
    assert folder.config == model.config


@pytest.mark.parametrize("concat", ["hidden_first", "embedding_first"])
def test_pre_norm_modules_on_qwen2_are_in_mimos_layout(concat: str, tmp_path: Path) -> None:
    """Names and order of vLLM's mimo_mtp.py, and of the modeling_mimo.py of MiMo-7B."""
    trunk = folders.dense(tie_embeddings=False, attention=GroupedQueryConfig(qkv_bias=True))
    model = deepseek.build(trunk, depth=2, input_norm="pre", concat=concat).eval()
    contents, folder = round_trip(model, tmp_path, tolerance=1e-5)
    assert contents.modules == 2 and not contents.heads
    fields, index = read_json(tmp_path / "one" / CONFIG), folders.index_of(tmp_path / "one")
    assert (fields["model_type"], fields["num_nextn_predict_layers"]) == ("mimo", 2)
    names = {n.removeprefix("model.mtp_layers.1.") for n in index if "_layers.1" in n}
    assert {n for n in names if not n.startswith("model.")} == {
        "token_layernorm.weight", "hidden_layernorm.weight", "input_proj.weight",
        "input_layernorm.weight", "post_attention_layernorm.weight", "final_layernorm.weight",
        *(f"self_attn.{n}_proj.weight" for n in "qkvo"),
        *(f"self_attn.{n}_proj.bias" for n in "qkv"),
        *(f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }  # fmt: skip
    assert folder.config.mtp.to_dict()["concat"] == "hidden_first"


def test_dense_modules_on_latent_attention_have_no_layout(tmp_path: Path) -> None:
    """Of DeepSeek's MTP layers transformers always makes mixtures of experts."""
    trunk = folders.dense(n_kv_heads=4, attention=deepseek.LATENT)
    model = deepseek.build(trunk, depth=1)
    assert folders.write(tmp_path / "one", model).heads
    assert read_folder(tmp_path / "one").config.mtp == model.config.mtp


def test_a_stack_without_weights_is_a_plain_model(tmp_path: Path) -> None:
    model = models.build(folders.DENSE, "parameter_free", depth=2)
    contents = folders.write(tmp_path / "one", model)
    assert contents.modules == 0 and not contents.heads
    assert read_folder(tmp_path / "one").config.mtp.variant == "none"


def test_depth_k_is_the_layer_k_after_the_trunk(tmp_path: Path) -> None:
    """docs/semantics.md: depth k is layer L + k - 1, with copies of embedding and head."""
    model = deepseek.build(folders.TRUNKS["deepseek"], depth=2)
    folders.write(tmp_path / "one", model)
    names = folders.index_of(tmp_path / "one")
    for layer in (3, 4):
        for part in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head",
                     "embed_tokens", "mlp.experts.7.down_proj", "mlp.gate"):  # fmt: skip
            assert f"model.layers.{layer}.{part}.weight" in names
    config = read_json(tmp_path / "one" / CONFIG)
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (3, 2)


@pytest.mark.parametrize(("d_head", "rotary_dim"), [(44, 30), (16, 16), (128, 64), (20, 2)])
def test_the_rotated_share_of_heads_is_read_back_exactly(d_head: int, rotary_dim: int) -> None:
    """30 / 44 * 44 is less than 30."""
    trunk = folders.TRUNKS["glm4_moe"]
    trunk = replace(trunk, d_head=d_head, attention=replace(trunk.attention, d_rope=rotary_dim))
    fields = to_json(deepseek.build(trunk).config, depth=0, max_positions=64, dtype="float32",
                     eot_id=None)  # fmt: skip
    back = from_json(fields, depth=0, source="x")
    assert back.attention.rotary_dim(back) == rotary_dim


@pytest.mark.parametrize(
    ("trunk", "message"),
    [
        (folders.dense(feed_forward=replace(deepseek.EXPERTS, n_shared=0)),
         "no supported layout has both"),
        (folders.dense(attention=GroupedQueryConfig(d_rope=4)),
         "model.attention.d_rope=4 cannot be exported with dense layers"),
        (folders.dense(attention=GroupedQueryConfig(qk_norm=True, qkv_bias=True)),
         "no layout has both"),
        (deepseek.trunk(experts={"n_shared": 0}), "always has a shared expert"),
        (deepseek.trunk(norm_eps=1e-5), "latents with epsilon 1e-05"),
        (folders.dense(n_heads=3, n_kv_heads=1, d_head=8), "divisible"),
    ],
)  # fmt: skip
def test_trunks_without_a_layout_are_refused(trunk: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        folders.write(tmp_path / "one", deepseek.build(trunk))
    assert not (tmp_path / "one").exists()


def test_modules_that_never_read_tokens_have_no_layout() -> None:
    for p, fits in ((0.0, True), (0.5, True), (1.0, False)):
        model = deepseek.build(folders.DENSE, depth=1, token_dropout=p)
        assert conversion.has_layout(model.config) == fits
        if fits:  # without the vector for dropped tokens
            assert conversion.in_layers(model.config).mtp == SequentialConfig(depth=1)
            assert "mtp.blank" not in conversion.plain(model)

"""Models of transformers here, and models of this project in transformers."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from data_modules.tokenizers import BPETokenizer, ByteTokenizer
from data_modules.windows import WindowBatch
from mtp_lightning.decoding import generate
from mtp_lightning.errors import UserError
from mtp_lightning.interop import check
from mtp_lightning.interop.config_reading import from_json, max_positions, require_known
from mtp_lightning.interop.tensor_files import CONFIG, read_json
from mtp_lightning.interop.transformers_model import one_line
from mtp_lightning.interop.verify import (
    TEXT,
    CheckFailed,
    check_bytes,
    check_tokenizer,
    check_with_transformers,
    rounded,
)
from mtp_lightning.interop.weight_map import weight_map
from mtp_lightning.interop.writing import write_tokenizer
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.opening import open_model
from tests import deepseek
from tests.integration import helpers
from tests.interop import folders
from tests.interop.folders import read_folder
from tests.interop.theirs import INSTALLED, LLAMA3, THEIRS, YARN, save, transformers

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(not INSTALLED, reason="needs transformers: pip install -e '.[hf]'"),
    # transformers imports optional packages that warn.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("name", THEIRS)
def test_models_of_transformers_give_equal_logits_here(name: str, tmp_path: Path) -> None:
    theirs = save(tmp_path, name)
    folder = read_folder(tmp_path)
    model = folder.build()
    assert model.depth == 0
    folders.assert_equal_logits(model, theirs, rows=folders.ROWS)


def test_a_null_share_of_glms_heads_rotates_them_whole(tmp_path: Path) -> None:
    """Without the field, half of each is rotated."""
    save(tmp_path, "glm4_moe")
    folders.change_config(tmp_path, rope_parameters=None)
    folders.change_json(tmp_path / CONFIG, partial_rotary_factor=None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    folders.assert_equal_logits(read_folder(tmp_path).build(), theirs, rows=folders.ROWS)


def test_mistrals_window_is_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind, fields = THEIRS["mistral"]
    monkeypatch.setitem(THEIRS, "windowed", (kind, {**fields, "sliding_window": 8}))
    theirs = save(tmp_path, "windowed")
    write_tokenizer(tmp_path, ByteTokenizer(), max_positions=8)
    run = open_model(tmp_path)
    assert run.seq_len == 8
    assert caplog.text.count("up to the window's 8 tokens, which become the context") == 1
    tokens = torch.randint(folders.ROWS, (2, 10))
    with torch.no_grad():
        expected = theirs(tokens[:, :9]).logits
        logits = run.model.head(run.model(WindowBatch(tokens, 0))[0])
    torch.testing.assert_close(logits[:, :8], expected[:, :8], rtol=0, atol=1e-4)
    assert not torch.allclose(logits[:, 8], expected[:, 8], rtol=0, atol=1e-4)
    # transformers' cache has the window of a Llama config, and Qwen2's needs use_sliding_window.
    # Types of layers replace a window, but not Mistral's.
    full = ["full_attention"] * 2
    for kind, layers, windowed in (
        ("llama", None, True),
        ("llama", full, False),
        ("mistral", full, True),
        ("qwen2", None, False),
    ):
        folders.change_json(tmp_path / CONFIG, model_type=kind, layer_types=layers)
        assert (max_positions(read_json(tmp_path / CONFIG)) == 8) == windowed
    folders.change_json(
        tmp_path / CONFIG, model_type="mistral", layer_types=None, sliding_window=None
    )
    assert open_model(tmp_path).seq_len > 8


@pytest.mark.parametrize("name", THEIRS)
def test_a_missing_field_has_the_default_of_transformers(name: str) -> None:
    kind, sizes = THEIRS[name]
    config = getattr(transformers, f"{kind}Config")

    def trunk(fields: dict[str, Any]) -> TrunkConfig:
        require_known(fields, source="x")
        return from_json(fields, depth=0, source="x")

    whole = config(**sizes).to_dict()
    # A wrong default of these is seen in the shapes of tensors.
    for missing in whole.keys() - {"model_type", "num_key_value_heads", "q_lora_rank"}:
        fields = {field: value for field, value in whole.items() if field != missing}
        try:
            read = trunk(fields)
        except UserError:  # refused by its name
            continue
        assert read == trunk(config(**copy.deepcopy(fields)).to_dict()), missing


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": YARN, "rope_parameters": LLAMA3},
        {"rope_scaling": {"type": "default"}, "rope_parameters": YARN, "rope_theta": 1e6},
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 32},
    ],
)
def test_rotary_parameters_are_read_from_the_fields_of_transformers(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    save(tmp_path, "llama")
    folders.change_config(tmp_path, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    here = read_folder(tmp_path).build()
    folders.assert_equal_logits(here, model, rows=folders.ROWS)


@pytest.mark.parametrize("name", ["llama", "deepseek", "glm4_moe"])
def test_sharded_folders_in_bfloat16_are_read(name: str, tmp_path: Path) -> None:
    theirs = save(tmp_path, name, dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    folder = read_folder(tmp_path)
    norm = folder.weights["trunk.blocks.1.attention_norm.weight"]
    assert torch.equal(norm, theirs.model.layers[1].input_layernorm.weight)
    lines = list(check_with_transformers(tmp_path, folder.build()))
    assert any("logits of the trunk" in line for line in lines)


def test_training_modules_keeps_the_trunk(tmp_path: Path, cache: Path) -> None:
    """Trains modules on a trunk of transformers, decodes with them, and exports both."""
    save(tmp_path / "theirs", "glm4_moe")
    write_tokenizer(tmp_path / "theirs", ByteTokenizer(), max_positions=64)
    theirs = read_folder(tmp_path / "theirs")
    settings = {
        **helpers.FROM_FOLDER, "init_from": tmp_path / "theirs", "mtp.freeze_trunk": "true",
        "mtp.depth": 1, "trainer.max_steps": 6, "trainer.val_check_interval": 3,
    }  # fmt: skip
    helpers.train_here(tmp_path / "run", cache, settings)
    run = open_model(tmp_path / "run")
    plain, drafted = (
        generate(run.model, [[5, 6, 7]], max_new_tokens=16, speculative=speculative)[0]
        for speculative in (False, True)
    )
    assert plain.token_ids == drafted.token_ids and drafted.drafts_reached[0] > 0
    back = read_folder(folders.export_run(tmp_path / "run", tmp_path / "out"))
    assert back.config.mtp.depth == 1 and back.config.trunk == theirs.config.trunk
    for name, tensor in theirs.weights.items():
        assert torch.equal(back.weights[name], tensor), f"{name} moved"


@pytest.mark.parametrize(
    ("name", "depth", "switches"),
    [
        *((name, 2, {}) for name in folders.TRUNKS),
        *((name, 0, {}) for name in ("llama", "deepseek")),
        # transformers must give the logits of the original model, not of the converted one.
        ("deepseek", 2, {"share_layers": True}),
        ("deepseek", 2, {"concat": "hidden_first"}),
    ],
)
def test_exported_models_pass_the_check(
    name: str, depth: int, switches: dict[str, Any], tmp_path: Path
) -> None:
    model = deepseek.build(folders.TRUNKS[name], depth=depth, **switches).eval()
    folders.write(tmp_path / "one", model)
    check_bytes(tmp_path / "one", model, dtype="float32")
    lines = list(check_with_transformers(tmp_path / "one", model))
    assert sum("logits of the MTP depth" in line for line in lines) == depth
    assert any("use_mtp=True" in line for line in lines) == bool(depth)


def test_bfloat16_is_checked_against_rounded_weights(tmp_path: Path) -> None:
    model = deepseek.build(folders.TRUNKS["deepseek"], depth=1).eval()
    folders.write(tmp_path / "one", model, dtype="bfloat16")
    assert list(check_with_transformers(tmp_path / "one", rounded(model, "bfloat16")))
    with pytest.raises(CheckFailed, match="logits of the trunk differ"):
        list(check_with_transformers(tmp_path / "one", model))


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("model.layers.3.eh_proj.weight", 1),
        ("model.layers.3.shared_head.norm.weight", 1),
        ("model.layers.4.mlp.experts.5.up_proj.weight", 2),
        ("model.layers.1.mlp.gate.e_score_correction_bias", 0),
    ],
)
def test_a_changed_tensor_fails_the_checks(name: str, depth: int, tmp_path: Path) -> None:
    """One check names the tensor, the other the depth whose logits differ."""
    model = deepseek.build(folders.TRUNKS["deepseek"], depth=2).eval()
    folders.write(tmp_path / "one", model)
    shape = next(s for p in weight_map(model.config) for n, s in p.parts if n == name)
    changed = torch.linspace(-1, 2, torch.Size(shape).numel()).view(shape)
    folders.merge(tmp_path / "one", lambda tensors: tensors.update({name: changed}))
    with pytest.raises(CheckFailed, match=f"{name} .* is not the model's tensor"):
        check_bytes(tmp_path / "one", model, dtype="float32")
    where = "trunk" if depth == 0 else rf"MTP depth {depth} \(model.layers.{2 + depth}"
    with pytest.raises(CheckFailed, match=f"logits of the {where}"):
        list(check_with_transformers(tmp_path / "one", model))


def test_a_missing_tensor_fails_the_checks(tmp_path: Path) -> None:
    model = deepseek.build(folders.TRUNKS["deepseek"], depth=2).eval()
    folders.write(tmp_path / "one", model)
    folders.merge(tmp_path / "one", lambda tensors: tensors.pop("model.layers.4.hnorm.weight"))
    with pytest.raises(CheckFailed, match=r"model.layers.4.hnorm.weight is missing"):
        check_bytes(tmp_path / "one", model, dtype="float32")
    with pytest.raises(ValueError, match=r"model.layers.4.hnorm.weight is missing"):
        list(check_with_transformers(tmp_path / "one", model))


@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek", "glm4_moe"])
def test_transformers_drafts_after_the_one_line_of_the_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deepseek.build(folders.TRUNKS[name], depth=2).eval()
    folders.write(tmp_path / "one", model)
    fields = read_json(tmp_path / "one" / CONFIG)
    line = one_line(fields["model_type"], model.config.trunk.n_layers, 2)
    kind = getattr(transformers, fields["architectures"][0])
    before = kind._keys_to_ignore_on_load_unexpected
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", before)  # put back at the end
    exec(line, {"transformers": transformers})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "one")
    inputs = tokenizer("import os", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [ByteTokenizer().encode("import os").tolist()]
    plain = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)
    drafted = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, use_mtp=True)
    assert plain.tolist() == drafted.tolist()


def test_check_refuses_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UserError, match="m.gguf is a GGUF file: it is examined by mtp-lightning"):
        check.check(tmp_path / "m.gguf")


def test_check_prints_the_line_and_its_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = deepseek.build(folders.TRUNKS["deepseek"], depth=1)
    folders.write(tmp_path / "one", model)
    check.check(tmp_path / "one")
    output = capsys.readouterr().out
    assert one_line("deepseek_v3", 3, 1) in output and "use_mtp=True" in output
    assert output.endswith("all equal\n")
    before = transformers.DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected
    assert before == [r"model\.layers\.61.*"], "the check leaves the process' class alone"


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"id2label": [1]}),
        ("config.json", {"pad_token_id": {}}),
        ("config.json", {"torch_dtype": []}),
        ("generation_config.json", {"pad_token_id": {}}),
    ],
)
def test_check_refuses_values_that_transformers_cannot_read(
    file: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folders.write(tmp_path, deepseek.build(folders.dense(), depth=1))
    folders.change_json(tmp_path / file, **changes)
    with pytest.raises(UserError, match="transformers cannot load") as error:
        check.check(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokenizers_give_the_same_ids(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "def f():\n    return 'naïve — 東京'  # 1 2 345\n"
    tokenizer: Any = ByteTokenizer()
    if kind == "bpe":
        tokenizer = BPETokenizer(vocab_size=300).train([text * 20])
    write_tokenizer(tmp_path, tokenizer, max_positions=8)
    said: list[str] = []
    monkeypatch.setattr(logging.Logger, "handle", lambda _, record: said.append(record.msg))
    check_tokenizer(tmp_path, tokenizer)
    assert not said  # of the sample, which is longer than the context
    monkeypatch.undo()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(text)["input_ids"]
    assert ids == tokenizer.encode(text).tolist() and theirs.decode(ids) == text
    write_tokenizer(tmp_path, ByteTokenizer(), max_positions=64)
    if kind == "bpe":
        with pytest.raises(CheckFailed, match="gives other ids"):
            check_tokenizer(tmp_path, tokenizer)


def test_code_of_a_tokenizer_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that transformers cannot read is refused."""
    write_tokenizer(tmp_path, ByteTokenizer(), max_positions=64)
    config = tmp_path / "tokenizer_config.json"
    custom_code = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (tmp_path / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folders.change_json(config, **custom_code)
    assert "but not in AutoTokenizer" in check_tokenizer(tmp_path, ByteTokenizer())
    assert not (tmp_path / "ran").exists()
    folders.change_json(config, model_max_length="x", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(CheckFailed, match="cannot be read: .*not supported"):
        check_tokenizer(tmp_path, ByteTokenizer())


def test_tokenizers_of_qwen2_folders_are_checked_with_the_named_class(
    tmp_path: Path,
) -> None:
    """AutoTokenizer splits text by Qwen2's rule there instead of tokenizer.json's."""
    model = folders.random_model(folders.TRUNKS["qwen2"], SequentialConfig(depth=1))
    tokenizer: Any = BPETokenizer(vocab_size=300).train([TEXT * 20])
    folders.write(tmp_path / "one", model, tokenizer)
    note = check_tokenizer(tmp_path / "one", tokenizer)
    assert note.endswith("in PreTrainedTokenizerFast, but not in AutoTokenizer")

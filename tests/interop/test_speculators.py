"""Heads in the layout of vLLM's library speculators: the folder, and the logits of that library.

The library needs an older transformers than this project, and so an environment of its own.
``SPECULATORS_PYTHON`` names its interpreter:

    python -m venv DIR && DIR/bin/pip install speculators==0.9.0
    SPECULATORS_PYTHON=DIR/bin/python pytest -n 0 -m extras tests/interop/test_speculators.py
"""

from __future__ import annotations

import inspect
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from data_modules.tokenizers import ByteTokenizer
from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.interop import card, speculators
from mtp_lightning.interop.exporting import trunk_alone
from mtp_lightning.interop.verify import CheckFailed
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.dflash import DFlashConfig
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.opening import open_model
from tests.interop import folders

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]

PYTHON = os.environ.get("SPECULATORS_PYTHON")
NORMED = GroupedQueryConfig(qk_norm=True)
QWEN3 = folders.dense(attention=NORMED, d_head=16, n_layers=4, init_std=0.3, norm_eps=1e-5)
LLAMA = folders.dense(
    n_layers=4, init_std=0.3, tie_embeddings=False, rope_scaling=folders.STRETCHED
)
MODELS: dict[str, tuple[TrunkConfig, MTPConfig]] = {
    "one": (QWEN3, SequentialConfig(depth=1)),
    "shared": (
        folders.dense(attention=NORMED, init_std=0.3, tie_embeddings=False),
        SequentialConfig(depth=3, share_layers=True, concat="hidden_first", token_dropout=0.1),
    ),
    "eagle": (QWEN3, EagleConfig(depth=3, draft_vocab=50)),
    "eagle-whole": (LLAMA, EagleConfig(depth=2, layers=(0, 1, 3))),
}
LENGTH = 24


def build(name: str) -> MTPModel:
    return folders.random_model(*MODELS[name])


def write(folder: Path, model: MTPModel, dtype: torch.dtype = torch.float32) -> Path:
    """The trunk's folder with the heads inside; returns the heads'."""
    folders.write(folder, trunk_alone(model))
    options = {"max_positions": 64, "eot_id": ByteTokenizer().eot_id}
    speculators.write(folder, model, verifier=folder, dtype=dtype, **options)
    return folder / speculators.FOLDER


# Rows and columns of the folders' matrices: widths 32, 48, two key heads of 16, 264 tokens.
BLOCK = {
    "input_layernorm": [32],
    "self_attn.o_proj": [32, 64],
    "post_attention_layernorm": [32],
    "mlp.gate_proj": [48, 32],
    "mlp.up_proj": [48, 32],
    "mlp.down_proj": [32, 48],
}
MTP = {
    **BLOCK, "token_layernorm": [32], "hidden_layernorm": [32], "input_proj": [32, 64],
    "self_attn.q_proj": [64, 32], "self_attn.k_proj": [32, 32], "self_attn.v_proj": [32, 32],
    "self_attn.q_norm": [16], "self_attn.k_norm": [16], "final_layernorm": [32],
}  # fmt: skip
MTP = {f"mtp_layers.0.{name}": shape for name, shape in MTP.items()}
EAGLE = {
    **BLOCK, "hidden_norm": [32],
    "self_attn.q_proj": [64, 64], "self_attn.k_proj": [32, 64], "self_attn.v_proj": [32, 64],
}  # fmt: skip
EAGLE = {f"layers.0.{name}": shape for name, shape in EAGLE.items()}
EAGLE |= {"embed_tokens": [264, 32], "fc": [32, 96], "norm": [32], "lm_head": [50, 32]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "layout"), [("one", MTP), ("eagle", EAGLE)])
def test_the_folder_has_the_names_shapes_and_fields_of_the_library(
    name: str, layout: dict[str, list[int]], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build(name)
    fields, tensors = folders.read(write(tmp_path, model, dtype))
    tables = {n: tensors.pop(n) for n in ("d2t", "t2d") if n in tensors}
    assert {n: list(t.shape) for n, t in tensors.items()} == {
        f"{n}.weight": shape for n, shape in layout.items()
    }
    assert {t.dtype for t in tensors.values()} == {dtype}
    assert "holds the heads" in speculators.check(tmp_path, model, dtype)
    eagle = name == "eagle"
    kind = "eagle3" if eagle else "mtp"
    layer = {
        "model_type": "llama" if eagle else "qwen3",
        "num_hidden_layers": 1 if eagle else 4,
        "hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "vocab_size": 264,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": False,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }  # fmt: skip
    layer_config = fields.pop("transformer_layer_config")
    assert {n: layer_config.get(n) for n in layer} == layer
    assert fields.pop("speculators_config") == {
        "algorithm": kind,
        "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3 if eagle else 1}],
        "verifier": {"name_or_path": str(tmp_path), "architectures": ["Qwen3ForCausalLM"]},
    }
    assert fields == {
        "architectures": ["Eagle3DraftModel" if eagle else "MTPDraftModel"],
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **({"draft_vocab_size": 50, "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
            "norm_before_residual": False, "norm_before_fc": False, "fc_norm": False,
            "norm_output": False} if eagle else {"num_nextn_predict_layers": 1}),
    }  # fmt: skip
    if eagle:
        tokens = model.mtp.layer.head.tokens
        assert torch.equal(tables["d2t"] + torch.arange(50), tokens)
        assert tables["t2d"].nonzero().flatten().tolist() == tokens.tolist()
    else:
        assert not tables


def test_a_shared_module_is_written_once_with_the_embedding_first(tmp_path: Path) -> None:
    model = build("shared")
    fields, tensors = folders.read(write(tmp_path, model))
    assert tensors.keys() == {f"{n}.weight" for n in MTP}
    assert fields["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    hidden, embedded = model.mtp.state_dict()["depths.0.eh_proj.weight"].chunk(2, dim=1)
    projection = tensors["mtp_layers.0.input_proj.weight"]
    assert torch.equal(projection, torch.cat((embedded, hidden), dim=1))


def test_a_whole_draft_vocabulary_has_no_tables(tmp_path: Path) -> None:
    fields, tensors = folders.read(write(tmp_path, build("eagle-whole")))
    assert fields["draft_vocab_size"] == len(tensors["lm_head.weight"]) == folders.ROWS
    assert not {"d2t", "t2d"} & tensors.keys()


@pytest.mark.parametrize(
    ("trunk", "mtp", "message"),
    [
        (QWEN3, SequentialConfig(depth=2), "mtp.depth=2 has a module for every depth"),
        (QWEN3, SequentialConfig(depth=1, input_norm="pre"), "mtp.input_norm=pre has no place"),
        (QWEN3, SequentialConfig(depth=1, branch="before_last"), "mtp.branch=before_last has no"),
        (QWEN3, SequentialConfig(depth=1, token_dropout=1.0), "mtp.token_dropout=1 has no place"),
        (QWEN3, SequentialConfig(depth=1, blocks=2), "mtp.blocks=2 has no place"),
        (LLAMA, SequentialConfig(depth=1), "the trunk has the layers of llama"),
        (QWEN3, SequentialConfig(depth=0), "mtp=sequential of depth 0 has no heads"),
        (QWEN3, LinearConfig(depth=2), "mtp=linear of depth 2 has no heads"),
        (QWEN3, DFlashConfig(depth=2), "the mask of mtp=dflash is trained, and the library"),
        (QWEN3, EagleConfig(depth=2, layers=(1, 2, 4)), r"mtp.layers=\[1, 2, 4\] has no place"),
        (QWEN3, EagleConfig(depth=2, confidence=True), "objective.confidence=true has no place"),
    ],
)
def test_models_that_the_library_computes_differently_are_refused(
    trunk: TrunkConfig, mtp: MTPConfig, message: str
) -> None:
    start = "layout=speculators cannot hold this model, and layout=own can: "
    with pytest.raises(UserError, match=f"^{start}{message}"):
        speculators.kind(ModelConfig(trunk=trunk, mtp=mtp))


def test_export_writes_a_speculator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="the check needs it: pip install -e '.[hf]'")
    model, source, out = build("one"), tmp_path / "in", tmp_path / "out"
    folders.write(source, model)
    (source / card.FILE).write_text("of a model with MTP layers")
    folders.export_run(source, out, layout="speculators")
    output = capsys.readouterr().out
    assert "logits of the trunk equal" in output and output.endswith("verified\n")
    assert "speculator, read back, holds the heads" in output
    fields, _ = folders.read(out / "speculator")
    assert fields["speculators_config"]["verifier"]["name_or_path"] == str(out.resolve())
    assert open_model(out).model.depth == 0
    text = (out / card.FILE).read_text()
    assert "folder `speculator` in the layout of vLLM's library speculators 0.9.0" in text
    assert f"{model.config.num_params() - model.config.num_trunk_params():,} of the MTP" in text
    refusals: list[tuple[Path, str, dict[str, Any], str]] = [
        (source, "m.gguf", {}, "is a single file"),
        (source, "x", {"depth": 0}, "depth=0 leaves the heads out"),
        (out, "x", {}, "of depth 0 has no heads"),
    ]
    for checkpoint, name, settings, message in refusals:
        with pytest.raises(UserError, match=f"layout=speculators .*{message}"):
            folders.export_run(checkpoint, tmp_path / name, layout="speculators", **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_heads_of_another_model_fail_the_check(tmp_path: Path) -> None:
    model = build("one")
    write(tmp_path, model)
    with torch.no_grad():
        model.mtp.state_dict()["depths.0.hnorm.weight"][3] += 1e-3
    name = "mtp_layers.0.hidden_layernorm.weight in .*speculator"
    with pytest.raises(CheckFailed, match=f"{name} is not the model's tensor"):
        speculators.check(tmp_path, model, torch.float32)


def library_logits(tokens: str, *heads: str) -> None:
    """Writes into the heads' folders the logits that the library computes for every depth, and the
    heads as it saves them. The other interpreter runs this function's source."""
    from pathlib import Path

    import torch
    from safetensors.torch import load_file, save_file
    from speculators import SpeculatorModel, SpeculatorModelConfig
    from transformers import AutoModelForCausalLM

    ids = load_file(tokens)["ids"]
    for folder in heads:
        config: Any = SpeculatorModelConfig.from_pretrained(folder)
        # Its default for EAGLE-3, blocks of FlexAttention, needs lengths of whole blocks.
        config.transformer_layer_config._attn_implementation = "eager"
        draft: Any = SpeculatorModel.from_pretrained(folder, config=config).eval()
        settings = config.speculators_config
        verifier = AutoModelForCausalLM.from_pretrained(settings.verifier.name_or_path).eval()
        logits: list[Any] = []
        draft.lm_head.register_forward_hook(lambda *call, to=logits: to.append(call[2]))
        steps = settings.proposal_methods[0].speculative_tokens
        with torch.no_grad():
            states = verifier(ids, output_hidden_states=True).hidden_states
            if config.speculators_model_type == "mtp":
                draft(input_ids=ids, hidden_states=states[-1])  # the last one is normed
            else:
                layers = config.eagle_aux_hidden_state_layer_ids
                fused = torch.cat([states[n] for n in layers], dim=-1)[:, :-1]
                document = torch.zeros_like(ids[:, 1:])
                inputs = {"hidden_states": fused, "input_ids": ids[:, 1:]}
                draft(**inputs, document_ids=document, ttt_steps=steps)
        by_depth = {str(k): x.contiguous() for k, x in enumerate(logits, start=1)}
        save_file(by_depth, Path(folder) / "logits.safetensors")
        draft.save_pretrained(Path(folder) / "saved")


@pytest.mark.skipif(
    PYTHON is None, reason="SPECULATORS_PYTHON names no interpreter that has speculators"
)
def test_the_library_computes_the_same_logits(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    probe = "from importlib.util import find_spec; assert find_spec('speculators')"
    if subprocess.run([str(PYTHON), "-c", probe], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} cannot import speculators: pip install speculators==0.9.0")
    models = {name: build(name) for name in MODELS}
    paths = {name: write(tmp_path / name, model) for name, model in models.items()}
    # As many tokens as the deepest of them reads.
    ids = torch.randint(folders.ROWS, (1, LENGTH + 4), generator=torch.Generator().manual_seed(3))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    source = inspect.getsource(library_logits)
    code = f"import sys\nfrom typing import Any\n{source}\nlibrary_logits(*sys.argv[1:])"
    arguments = [str(tmp_path / "ids.safetensors"), *map(str, paths.values())]
    done = subprocess.run(
        [str(PYTHON), "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, model in models.items():
        by_depth, depth = load_file(paths[name] / "logits.safetensors"), model.depth
        assert by_depth.keys() == {str(k) for k in range(1, depth + 1)}
        with torch.no_grad():
            hidden = model(WindowBatch(ids[:, : LENGTH + depth + 1], depth))
            outputs = {k: model.head_of(k)(h)[0] for k, h in hidden.items()}
        for k in range(1, depth + 1):
            expected = outputs[k]
            if model.mtp.own_head is not None:
                expected = expected[:, model.mtp.own_head.tokens]
            logits = by_depth[str(k)][0, :LENGTH]
            worst = (logits - expected).abs().max().item()
            print(f"{name} depth {k}: {worst:.1e} of {expected.abs().max():.1f}")
            assert expected.std() > 0.1 and worst <= 1e-4, (name, k, worst)
        tensors, saved = folders.read(paths[name])[1], folders.read(paths[name] / "saved")[1]
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[n], tensors[n]) for n in tensors)

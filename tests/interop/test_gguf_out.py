"""GGUF files that this project writes, read back here, by transformers and by llama.cpp."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_modules.tokenizers import BPETokenizer, ByteTokenizer, SymbolTokenizer
from data_modules.windows import WindowBatch
from mtp_lightning.decoding import generate
from mtp_lightning.errors import UserError
from mtp_lightning.interop import gguf_tokenizer, gguf_writing, llama_cpp
from mtp_lightning.interop.gguf_layout import GGUFEntry, Layout, entries, layout_of
from mtp_lightning.interop.gguf_reader import read_header
from mtp_lightning.interop.verify import CheckFailed
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.opening import open_model
from tests import deepseek, models
from tests.interop import folders
from tests.interop.folders import read_folder
from tests.interop.gguf_files import (
    MARKS,
    assert_equal_acceptance,
    gguf,
    hf_model,
    needs_llama_cpp,
    write,
)
from tests.interop.language import learn

pytestmark = MARKS
# The architectures of trunks. With a module it is glm4moe, with latent attention deepseek2.
ARCHS = {
    **dict.fromkeys(("llama", "llama-tied", "llama-wide-heads"), "llama"),
    **{"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"},
    **dict.fromkeys(("glm4_moe", "glm4_moe-whole-heads"), "glm4moe"),
    **dict.fromkeys(
        ("deepseek-shared", "deepseek-no-mixture-in-trunk", "deepseek-dense"), "deepseek2"
    ),
    "glm4_moe-30-of-44": "glm4moe",
}
COPIES = ("embed_tokens", "shared_head_head")
LLAMA3 = replace(folders.STRETCHED, original_positions=8192)
_GLM = folders.TRUNKS["glm4_moe"]
TRUNKS = {
    **folders.TRUNKS,
    # 30 / 44 * 44 is less than 30.
    "glm4_moe-30-of-44": replace(_GLM, d_head=44, attention=replace(_GLM.attention, d_rope=30)),
    "deepseek-dense": folders.dense(
        attention=deepseek.LATENT, n_kv_heads=4, tie_embeddings=False, norm_eps=1e-6
    ),
    "llama-stretched": folders.dense(rope_scaling=LLAMA3),
    "qwen2-stretched": replace(folders.TRUNKS["qwen2"], rope_scaling=LLAMA3),
}


@pytest.mark.parametrize(
    ("name", "depth"),
    [*((name, 3) for name in ARCHS), *((name, d) for name in list(ARCHS)[::4] for d in (0, 1))],
)
def test_a_file_read_back_is_the_model(name: str, depth: int, tmp_path: Path) -> None:
    model = models.build(TRUNKS[name], SequentialConfig(depth=depth))
    written = write(tmp_path / "m.gguf", model)
    arch = "glm4moe" if depth and ARCHS[name] != "deepseek2" else ARCHS[name]
    assert written.arch == arch
    assert ("modules 2 to 3 are left out" in " ".join(written.notes)) == (depth > 1)
    back = read_folder(tmp_path / "m.gguf").build()
    if name != "deepseek-no-mixture-in-trunk" or depth:  # alone it is a dense trunk
        spread = float(np.float32(model.config.trunk.init_std))
        trunk = {**back.config.trunk.to_dict(), "init_std": 0}
        assert trunk == {**model.config.trunk.to_dict(), "init_std": 0}
        assert back.config.trunk.init_std == pytest.approx(spread, rel=1e-6)
    expected = {
        n: t
        for n, t in model.state_dict().items()
        if not n.startswith(("mtp.depths.1", "mtp.depths.2"))
    }
    tensors = back.state_dict()
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensors[key], tensor), key
    tokens = torch.randint(folders.ROWS, (2, 24))
    back_window = WindowBatch(tokens, back.depth)
    window = WindowBatch(torch.cat((tokens, tokens[:, : model.depth - back.depth]), 1), model.depth)
    with torch.no_grad():
        for k, hidden in back(back_window).items():
            torch.testing.assert_close(hidden, model(window)[k][:, : hidden.shape[1]])


def test_shared_and_hidden_first_modules_are_converted(tmp_path: Path) -> None:
    """One shared module is written once, and the state's half of its projection second."""
    mtp = SequentialConfig(depth=2, share_layers=True, concat="hidden_first")
    model = models.build(TRUNKS["llama"], mtp)
    assert "left out" not in " ".join(write(tmp_path / "m.gguf", model).notes)
    read_back = read_folder(tmp_path / "m.gguf").build()
    first, second = model.mtp.state_dict()["depths.0.eh_proj.weight"].chunk(2, dim=1)
    projection = read_back.mtp.state_dict()["depths.0.eh_proj.weight"]
    assert torch.equal(projection, torch.cat((second, first), dim=1))


@pytest.mark.parametrize(
    ("trunk", "arch", "mtp", "message"),
    [
        ("llama", "llama", ParallelConfig(depth=2), "mtp=parallel"),
        ("llama", "llama", SequentialConfig(depth=1, input_norm="pre"), "mtp.input_norm=pre"),
        ("llama", "llama", SequentialConfig(depth=1, branch="before_last"),
         "mtp.branch=before_last"),
        ("llama", "llama", SequentialConfig(depth=1, blocks=2), "mtp.blocks=2"),
        ("llama", "llama", EagleConfig(depth=1, layers=(0, 0, 1)), "mtp.layers=[0, 0, 1]"),
        ("llama", "llama", EagleConfig(depth=1, confidence=True), "objective.confidence=true"),
        ("deepseek-tied", "deepseek2", SequentialConfig(depth=1), "q_rank=null"),
    ],
)  # fmt: skip
def test_heads_that_llama_cpp_does_not_read_are_named(
    trunk: str, arch: str, mtp: Any, message: str, tmp_path: Path
) -> None:
    written = write(tmp_path / "m.gguf", models.build(TRUNKS[trunk], mtp))
    assert written.arch == arch and "heads are left out" in written.notes[0]
    assert message in written.notes[0]
    assert read_folder(tmp_path / "m.gguf").config.mtp.depth == 0


@pytest.mark.parametrize(
    ("trunk", "message"),
    [
        ("llama3", "model.rope_scaling cannot be written as GGUF"),
        ("yarn", "model.rope_scaling cannot be written as GGUF"),
        ("qwen2-stretched", "except Llama 3's in a trunk like Llama's: export the model"),
        ("deepseek", "one epsilon for all"),
    ],
)
def test_trunks_that_llama_cpp_does_not_compute_are_refused(trunk: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layout_of(models.build(TRUNKS[trunk], SequentialConfig(depth=0)).config)


@pytest.mark.parametrize("sizes", [{"n_layers": 27}, {"n_layers": 48, "vocab_size": 128_256}])
def test_trunks_that_llama_cpp_takes_for_lite_ones_are_refused(sizes: dict[str, int]) -> None:
    """It knows them by their numbers of layers, and reads no query latent."""
    trunk = replace(TRUNKS["deepseek-shared"], **sizes)
    with pytest.raises(UserError, match=f"model.n_layers={sizes['n_layers']} .*DeepSeek-V2-Lite"):
        layout_of(ModelConfig(trunk=trunk, mtp=NoMTPConfig()))
    plain = replace(trunk, attention=replace(trunk.attention, q_rank=None))
    assert layout_of(ModelConfig(trunk=plain, mtp=NoMTPConfig())).arch == "deepseek2"


def test_llama_3s_scaling_is_written_without_modules(tmp_path: Path) -> None:
    model = models.build(TRUNKS["llama-stretched"], SequentialConfig(depth=1))
    written, file = write(tmp_path / "m.gguf", model), tmp_path / "m.gguf"
    assert written.arch == "llama" and "drafts with model.rope_scaling" in written.notes[0]
    divisors = next(t for t in gguf.GGUFReader(file).tensors if t.name == "rope_freqs.weight").data
    assert divisors.dtype == np.float32 and list(divisors[[0, -1]]) == [1, 8]
    assert "tensors, read back, are the model's" in checked_tensors(file, model, "float32")
    back = read_folder(file).build()
    assert back.config.trunk.rope_scaling == model.config.trunk.rope_scaling
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def checked_tensors(file: Path, model: MTPModel, dtype: str) -> str:
    """The result of the check of a file's tensors."""
    return next(gguf_writing.check_file(file, model, ByteTokenizer(), dtype))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "float32"),
        ("glm4_moe", "float16"),
        ("deepseek-shared", "bfloat16"),
        ("llama", "q8_0"),
        ("deepseek-shared", "q8_0"),
    ],
)
def test_tensors_are_rounded_once(name: str, dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    model = models.build(TRUNKS[name], SequentialConfig(depth=1))
    write(file, model, dtype=dtype)
    assert "tensors, read back, are the model's" in checked_tensors(file, model, dtype)
    dtypes = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    expected = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert dtypes["token_embd.weight"] == expected
    # Its rows have 24 numbers in the small DeepSeek, so they do not fill blocks.
    halves = dtype == "q8_0" and name == "deepseek-shared"
    assert dtypes["blk.0.attn_output.weight"] == ("F16" if halves else expected)
    assert dtypes["output_norm.weight"] == "F32"
    assert dtypes[f"blk.{model.config.trunk.n_layers}.nextn.eh_proj.weight"] == expected
    read_back = read_folder(file).build().trunk.embedding.weight
    embedding = model.trunk.embedding.weight.detach()
    if dtype == "q8_0":
        blocks = embedding.unflatten(1, (-1, 32))
        assert 0 < float(((read_back - embedding).abs().unflatten(1, (-1, 32)) * 127
                          / blocks.abs().amax(-1, keepdim=True)).max()) < 0.6  # fmt: skip
    else:
        assert torch.equal(read_back, embedding.to(getattr(torch, dtype)).float())
    with torch.no_grad():  # another model, by about a step of 8 bits
        model.mtp.state_dict()["depths.0.eh_proj.weight"][3, 5] += 0.05
    with pytest.raises(CheckFailed, match="nextn.eh_proj.weight in .* is not the model's"):
        checked_tensors(file, model, dtype)


@pytest.mark.parametrize("size", [1e-24, 1e-5, 1e-3])
def test_blocks_of_small_weights_are_written_in_8_bits(size: float, tmp_path: Path) -> None:
    model = models.build(TRUNKS["llama"], SequentialConfig(depth=1))
    with torch.no_grad():
        model.trunk.embedding.weight[5] *= size
    write(tmp_path / "m.gguf", model, dtype="q8_0")
    checked_tensors(tmp_path / "m.gguf", model, "q8_0")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-wide-heads", "qwen2", "qwen3"])
def test_transformers_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    """An independent reader of the plain architectures."""
    model = models.build(TRUNKS[name], SequentialConfig(depth=0))
    write(tmp_path / "m.gguf", model)
    # It takes 128 from no key of the file.
    settings = {"head_dim": model.config.trunk.d_head} if name == "qwen3" else {}
    reader = hf_model(tmp_path / "m.gguf", **settings)
    folders.assert_equal_logits(model.eval(), reader, rows=folders.ROWS)


@functools.cache
def trained_model(name: str, *, depth: int = 1, **mtp: Any) -> MTPModel:
    """A model that has learned a language, with a module whose drafts are often wrong."""
    config = models.build(TRUNKS[name], SequentialConfig(depth=depth, **mtp)).config
    return learn(MTPModel(config), "depths.0.eh_proj.weight")


@needs_llama_cpp
@pytest.mark.parametrize(
    ("name", "drafts", "mtp"),
    [
        ("llama", 1, {}),
        ("qwen3", 3, {"depth": 2, "share_layers": True}),
        ("glm4_moe-whole-heads", 1, {}),
        ("deepseek-shared", 1, {}),
        ("deepseek-dense", 1, {}),
    ],
)
def test_llama_cpp_accepts_the_same_share_of_drafts(
    name: str, drafts: int, mtp: dict[str, Any], tmp_path: Path
) -> None:
    """On 16 prompts, within one draft in a hundred; texts and log-probabilities are the same."""
    file = tmp_path / "m.gguf"
    model = trained_model(name, **mtp)
    write(file, model)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(64, (16, 6), generator=generator).tolist()
    options: dict[str, Any] = {"max_new_tokens": 40, "eot_id": None}
    # llama.cpp's module has one cache for all drafts of a round.
    drafted = generate(model, prompts, draft_depth=drafts, cache="single", **options)
    plain = generate(model, prompts, speculative=False, **options)
    answers = llama_cpp.continue_prompts(file, prompts, [40] * 16, drafts=drafts)
    assert [text.ids for text in answers] == [text.token_ids for text in plain]
    assert_equal_acceptance(drafted, answers)
    lines = list(llama_cpp.check(file, model, ByteTokenizer(), dtype="float32", context=64))
    assert "16 of 16 greedy texts the same" in lines[0] and "accepts" in lines[1]


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_llama_cpp_computes_rounded_weights(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    model = trained_model("llama")
    write(file, model, dtype=dtype)
    back = read_folder(file).build()
    lines = list(llama_cpp.check(file, back, ByteTokenizer(), dtype=dtype, context=64))
    assert len(lines) == 2


@needs_llama_cpp
def test_llama_cpp_is_not_asked_through_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request._opener", None)  # it has read the environment before
    write(tmp_path / "m.gguf", trained_model("llama"))
    (text,) = llama_cpp.continue_prompts(tmp_path / "m.gguf", [[1, 2]], [3])
    assert len(text.ids) == 3


@needs_llama_cpp
def test_a_file_that_llama_cpp_does_not_load_fails_the_check(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckFailed, match=r"does not load .*m\.gguf: .*verify=false\.$"):
        llama_cpp.continue_prompts(file, [[1, 2]], [3])


@needs_llama_cpp
@pytest.mark.parametrize("part", ["trunk", "module"])
def test_the_check_fails_for_a_file_of_another_model(part: str, tmp_path: Path) -> None:
    """The wrong rotary base, or the halves of the projection in the wrong order."""
    file = tmp_path / "m.gguf"
    model = trained_model("llama")
    theta = 3.0 if part == "trunk" else model.config.trunk.rope_theta
    other = models.build(folders.dense(tie_embeddings=False, rope_theta=theta), model.config.mtp)
    other.load_state_dict(model.state_dict())
    if part == "module":
        projection = other.mtp.state_dict()["depths.0.eh_proj.weight"]
        projection.copy_(torch.cat(projection.chunk(2, dim=1)[::-1], dim=1))
    write(file, other)
    with pytest.raises(CheckFailed, match="computes? something else"):
        list(llama_cpp.check(file, model, ByteTokenizer(), dtype="float32", context=64))


def stand_in(model: MTPModel, compared: list[list[int]], n_worse: int = 0) -> Callable[..., Any]:
    """A :func:`llama_cpp.continue_prompts` by the model itself, which adds its texts to
    ``compared``, and accepts no drafts in the first ``n_worse`` of them."""

    def continue_prompts(
        file: Path, prompts: Any, lengths: Any, *, drafts: int = 0, drafter: Any = None
    ) -> list[llama_cpp.Continuation]:
        way: dict[str, Any] = {"draft_depth": drafts} if drafts else {"speculative": False}
        continued = []
        for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
            (text,) = generate(model, [prompt], max_new_tokens=n, eot_id=None, **way)
            accepted = sum(text.drafts_accepted) if i >= n_worse else 0
            continued.append(llama_cpp.Continuation(text.token_ids, None, text.drafts, accepted))
        compared.extend(text.ids for text in continued)
        return continued

    return continue_prompts


@pytest.mark.parametrize("n_worse", [3, 9])
def test_other_drafts_in_a_few_texts_are_llama_cpps_own(
    n_worse: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module reads a position more; a wrong module drafts otherwise in most texts."""
    model = trained_model("llama")
    monkeypatch.setattr(llama_cpp, "continue_prompts", stand_in(model, [], n_worse))
    lines = llama_cpp.check(tmp_path, model, ByteTokenizer(), dtype="float32", context=64)
    with nullcontext() if n_worse == 3 else pytest.raises(CheckFailed, match="something else"):
        assert "with equal numbers in 13 of 16 texts" in list(lines)[1]


def test_texts_are_compared_up_to_their_first_end_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp never chooses an end token of the file, nor a token with the name of one."""
    model, compared = trained_model("llama"), list[list[int]]()
    tokenizer: Any = SimpleNamespace(end_ids=(256, 23))
    monkeypatch.setattr(llama_cpp, "continue_prompts", stand_in(model, compared))
    assert list(llama_cpp.check(tmp_path, model, tokenizer, dtype="q8_0", context=64))
    assert min(map(len, compared)) < 32 and not any(23 in ids for ids in compared)

    class Named(ByteTokenizer):
        def library_json(self) -> str:
            content = json.loads(super().library_json())
            content["added_tokens"].append(
                {**content["added_tokens"][0], "id": 257, "content": "<|im_end|>"}
            )
            return json.dumps(content)

    end_ids: list[Any] = []
    monkeypatch.setattr(llama_cpp, "is_there", lambda: True)
    monkeypatch.setattr(llama_cpp, "check", lambda f, m, t, **_: end_ids.append(t.end_ids) or [])
    file = tmp_path / "m.gguf"
    model = models.build(folders.dense(vocab_size=258), SequentialConfig(depth=0))
    write(file, model, Named())
    list(gguf_writing.check_file(file, model, Named(), "float32"))
    assert end_ids == [(256, 257)]


def overwrite_first_number(file: Path, name: str) -> None:
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == name)
    with file.open("r+b") as content:
        content.seek(tensor.data_offset)
        content.write(np.float32(1.0).tobytes())


def test_a_module_with_a_routed_expert_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write(file, models.build(TRUNKS["llama"], SequentialConfig(depth=1)))
    overwrite_first_number(file, "blk.2.ffn_up_exps.weight")
    with pytest.raises(UserError, match="blk.2.ffn_up_exps.weight is not zero"):
        read_folder(file)


def test_copies_of_embedding_and_head_are_compared_unless_a_quantizer_rounded_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_copies(layout: Layout) -> Iterator[GGUFEntry]:
        return (replace(entry, copy=False) for entry in entries(layout))

    def kind_of(entry: GGUFEntry, dtype: str) -> str:
        return "Q4_0" if entry.name in copies and dtype == "q8_0" else chosen(entry, dtype)

    copies, chosen = [f"blk.2.nextn.{n}.weight" for n in COPIES], gguf_writing._kind_of
    monkeypatch.setattr(gguf_writing, "entries", with_copies)
    monkeypatch.setattr(gguf_writing, "_kind_of", kind_of)
    model = models.build(TRUNKS["llama"], SequentialConfig(depth=1))
    file = tmp_path / "m.gguf"
    write(file, model, dtype="q8_0")
    back = read_folder(file).build()
    torch.testing.assert_close(back.head.weight, model.head.weight, rtol=0, atol=3e-3)
    for name in copies:
        write(file, model)
        assert read_folder(file).config.mtp.depth == 1
        overwrite_first_number(file, name)
        with pytest.raises(UserError, match="differs from the trunk's embedding or head"):
            read_folder(file)


def test_tokenizers_are_written_by_the_name_of_their_rule(tmp_path: Path) -> None:
    def library(rule: dict[str, Any], *, unmerged: bool) -> Any:
        class WithRule(ByteTokenizer):
            def library_json(self) -> str:
                content = {**json.loads(bpe.library_json()), "pre_tokenizer": rule}
                content["model"]["ignore_merges"] = unmerged
                return json.dumps(content)

        return WithRule()

    texts = [
        "def read_lines(path, 1234): it's a_b  don't\n" * 3,
        "Numbers 12 345, caf\u00e9 isn't\n" * 9,
    ]
    bpe: Any = BPETokenizer(400).train(texts)
    for name, rule in gguf_tokenizer._RULES.items():
        fields, notes = gguf_tokenizer.to_fields(library(rule, unmerged=name == "llama-bpe"), 400)
        assert not notes
        # The vocabulary is too small to tell DeepSeek-V3's rule from Llama 3's.
        assert fields["tokenizer.ggml.pre"] == name or name == "deepseek-v3"
    fields, (note,) = gguf_tokenizer.to_fields(bpe, 410)
    assert "sample texts get the same token ids" in note
    assert fields["tokenizer.ggml.tokens"][0] == "<|endoftext|>"
    assert fields["tokenizer.ggml.token_type"][0] == 3
    assert fields["tokenizer.ggml.token_type"][409] == 5
    model = models.build(folders.dense(vocab_size=410), SequentialConfig(depth=0))
    write(tmp_path / "m.gguf", model, bpe)
    back = open_model(tmp_path / "m.gguf")
    assert back.tokenizer.encode(texts[0]).tolist() == bpe.encode(texts[0]).tolist()
    assert back.tokenizer.eot_id == 0 and back.seq_len == 64
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    bpe.beside = {"tokenizer_config.json": json.dumps({"chat_template": several})}
    assert gguf_tokenizer.to_fields(bpe, 410)[0]["tokenizer.chat_template"] == "d"
    with pytest.raises(UserError, match="only BPE of bytes"):
        gguf_tokenizer.to_fields(SymbolTokenizer(["end", "a"]), 8)


def test_ends_beyond_llama_cpps_keys_are_kept_and_reported(tmp_path: Path) -> None:
    class Ends(ByteTokenizer):
        end_ids = (256, 3, 4, 70, 66)

    model = models.build(folders.dense(), SequentialConfig(depth=0))
    file = tmp_path / "m.gguf"
    assert write(file, model, Ends()).notes == [
        "llama.cpp ends no text with F, B, since a file names three such tokens there; this "
        "project does."
    ]
    assert open_model(file).tokenizer.end_ids == (256, 3, 4, 70, 66)
    write(file, model)
    assert "mtp_lightning.end_token_ids" not in read_header(file).fields
    # Here llama.cpp takes <|end|> for the end of a part.
    kept = {"mtp_lightning.end_token_ids": [0, 2]}
    assert gguf_tokenizer._ends(kept.get, ["<|end|>", "<|call|>", "<|return|>"]) == [0, 2, 1]


@pytest.mark.parametrize(("depth", "expected"), [(1, {"draft_vocab": 20}), (0, None)])
def test_a_file_names_the_tokens_that_its_module_drafts(
    depth: int, expected: Any, tmp_path: Path
) -> None:
    model = models.build(folders.dense(), SequentialConfig(depth=depth))
    write(tmp_path / "m.gguf", model, draft_vocab=20)
    assert open_model(tmp_path / "m.gguf").run_config.get("objective") == expected


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_export_writes_verifies_and_describes_a_file(
    finished: Path,
    dtype: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"checkpoint": finished, "output": tmp_path / "mine.gguf", "dtype": dtype}
    folders.export_run(**settings)
    output = capsys.readouterr().out
    for line in ("architecture glm4moe", "module 2 is left out", "--spec-type draft-mtp",
                 "tensors differ", "read back, are the model's", "ids for a text"):  # fmt: skip
        assert line in output
    assert "verified\ntext: " in output and "llama.cpp" in output
    assert "is dequantized" not in caplog.text  # the check reads it under its temporary name
    assert {file.name for file in tmp_path.iterdir()} == {"mine.gguf", "mine.md"}
    text = (tmp_path / "mine.md").read_text()
    assert "module 2 is left out" in text and "after 10 optimizer steps" in text
    with pytest.raises(FileExistsError, match="mine.gguf exists: choose another output="):
        folders.export_run(**settings)
    (tmp_path / "mine.gguf").unlink()
    with pytest.raises(FileExistsError, match="mine.md exists: choose another output="):
        folders.export_run(**settings)
    (tmp_path / "mine.md").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        folders.export_run(**settings, verify=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="shard_gb=2.0: a GGUF file is a single one"):
        folders.export_run(**settings, shard_gb=2.0)
    if dtype == "q8_0":
        with pytest.raises(UserError, match="dtype=q8_0 is for a GGUF file"):
            folders.export_run(finished, tmp_path / "folder", dtype=dtype)

"""GGUF files of other programs: weights against transformers, and tokenizers."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from data_modules.corpora import smollm2
from data_modules.tokenizers import (
    BPETokenizer,
    PretrainedTokenizer,
    tokenizer_from_state,
)
from data_modules.windows import WindowBatch
from mtp_lightning import llama_server
from mtp_lightning.certify.run import certify
from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.packed import Kind, packed_copy
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.measure import require_same_greedy
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.generating import open_for_decoding
from mtp_lightning.interop import gguf_blocks, gguf_file, gguf_reader, gguf_tokenizer
from mtp_lightning.interop.gguf_reader import Header, read_header
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.rope import Llama3Scaling
from mtp_lightning.opening import open_model
from mtp_lightning.parts import is_gguf
from tests import models
from tests.integration.helpers import ROOT, execute
from tests.interop import folders, gguf_files
from tests.interop.folders import read_folder
from tests.interop.gguf_files import (
    MARKS,
    SPECIALS,
    WORDS,
    gguf,
    hf_model,
    needs_llama_cpp,
    transformers,
    write_gguf,
)

pytestmark = MARKS


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_logits_equal_those_of_transformers(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", kind=kind)
    theirs = hf_model(file)
    model = read_folder(file).build()
    assert "holds rounded weights (tensors: " in caplog.text and "of Q4_1" in caplog.text
    folders.assert_equal_logits(model, theirs, rows=len(SPECIALS) + len(WORDS))


def test_messages_of_generate_are_not_in_its_json(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    options = ["prompt=a", "max_new_tokens=2", "output=json"]
    generate_py = str(ROOT / "generate.py")
    done = execute([sys.executable, generate_py, f"checkpoint={file}", *options])
    assert json.loads(done.stdout)["new_tokens"] == 2
    assert "holds rounded weights" in done.stderr


@pytest.mark.parametrize("alignment", [None, 128])
def test_headers_equal_those_of_ggufs_reader(alignment: int | None, tmp_path: Path) -> None:
    def every_kind(writer: Any) -> None:
        if alignment is not None:
            writer.add_custom_alignment(alignment)
        for kind in ("uint8", "int8", "uint16", "int16", "uint64", "int64", "float64"):
            getattr(writer, f"add_{kind}")(f"own.{kind}", 7)
        for name, values in (("numbers", [0.1, -2.0]), ("truths", [True, False]), ("words", ["é"])):
            writer.add_array(f"own.{name}", values)

    file = write_gguf(tmp_path / "tiny.gguf", k_quants=True, extra=every_kind)
    theirs, ours = gguf.GGUFReader(file), read_header(file)
    fields = {name: f.contents() for name, f in theirs.fields.items() if name[:5] != "GGUF."}
    assert ours.fields == fields
    for tensor, part in zip(theirs.tensors, ours.tensors.values(), strict=True):
        assert (part.name, part.kind) == (tensor.name, tensor.tensor_type)
        assert part.shape == tuple(reversed(tensor.shape.tolist()))
        assert part.offset == tensor.data_offset
        assert part.row_bytes == tensor.data.shape[-1] * tensor.data.itemsize


def test_a_tensor_is_dequantized_in_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    whole = read_folder(file).build().state_dict()
    monkeypatch.setattr(gguf_blocks, "_SLAB", 1)
    for name, tensor in read_folder(file).build().state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    tensors = read_header(file).tensors
    for tensor in gguf.GGUFReader(file).tensors:
        expected = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        numbers = gguf_blocks.numbers(file, tensors[tensor.name])
        assert torch.equal(numbers, expected), tensor.name


@pytest.mark.skipif(native.library is None, reason="no C++ for the layers on this machine")
def test_k_quants_decode_like_the_dequantized_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_blocks, "_SLAB", 1000)  # several portions a tensor
    file = write_gguf(tmp_path / "tiny.gguf", k_quants=True)
    dequantized, packed_model = open_model(file).model, open_for_decoding(file).model
    kinds = {
        "attention.qkv": Kind.BLOCKS8_FULL,  # of rows of Q4_K and Q6_K
        "attention.out": Kind.BLOCKS4_FULL,
        "feed_forward.gate_up": Kind.BLOCKS4_FULL,
        "feed_forward.down": Kind.BLOCKS8_FULL,
        "trunk.embedding": Kind.BLOCKS8_FULL,
    }
    for name, weight in packed_model.named_parameters():
        if weight.ndim == 2:
            packed: Any = packed_copy(weight)
            assert [packed.kind] == [kind for n, kind in kinds.items() if n in name], name
            assert torch.equal(packed.unpacked(), dequantized.get_parameter(name)), name
    prompts = [[5, 9, 20, 7], [3]]
    models = (dequantized, packed_model)
    expected, continued = (generate(m, prompts, max_new_tokens=20) for m in models)
    assert [g.token_ids for g in continued] == [g.token_ids for g in expected]
    # The certificate tests the same kernels; integers need them.
    options: Any = {"count": 8, "length": 6, "few": True, "precisions": ["fp32", "fp32/int8"]}
    certificate = certify(file, **options)
    assert certificate.rows and not certificate.broken()


@pytest.mark.skipif(native.library is None, reason="no C++ for the layers on this machine")
def test_matrices_of_f16_are_decoded_from_16_bits(tmp_path: Path) -> None:
    model = models.build(folders.dense(), SequentialConfig(depth=1))
    gguf_files.write(tmp_path / "m.gguf", model, dtype="float16")
    for name, weight in open_for_decoding(tmp_path / "m.gguf").model.named_parameters():
        packed: Any = packed_copy(weight)
        assert weight.ndim < 2 or packed.kind == Kind.FP16, name


def test_a_type_that_gguf_cannot_dequantize_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> Any:
        raise NotImplementedError

    file = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf.quants, "dequantize", unknown)
    with pytest.raises(UserError, match="the package gguf cannot dequantize: give a file of"):
        open_model(file)


def unpacked(fields: dict[str, Any], folder: Path) -> PretrainedTokenizer:
    """The tokenizer that the keys of a file describe."""
    assert gguf_tokenizer.unpack(fields.get, folder)
    return PretrainedTokenizer(str(folder))


@pytest.mark.parametrize("rule", gguf_tokenizer._RULES)
def test_tokenizers_split_by_the_rule_that_the_file_names(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of other programs name the rule; this project also writes the tokenizer.json."""
    texts = [*gguf_tokenizer._SAMPLE.split("\n"), "<|im_start|> 1234 words"]
    bpe: Any = BPETokenizer(500).train([gguf_tokenizer._SAMPLE * 4])
    content = json.loads(bpe.library_json()) | {
        "pre_tokenizer": gguf_tokenizer._RULES[rule],
        "normalizer": None,
    }
    monkeypatch.setattr(bpe, "library_json", lambda: json.dumps(content))
    fields, _ = gguf_tokenizer.to_fields(bpe, 500)
    fields |= {gguf_tokenizer.WHOLE: None, "tokenizer.ggml.pre": rule}
    monkeypatch.setitem(sys.modules, "transformers", None)
    tokenizer = unpacked(fields, tmp_path)
    expected = gguf_tokenizer._ids(json.dumps(content), texts)
    assert [tokenizer.encode(text).tolist() for text in texts] == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts
    assert tokenizer.eot_id == bpe.eot_id
    # Without the key, llama.cpp begins texts of Llama 3's kind alone.
    without_key = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": None}
    prompt = unpacked(fields | without_key, tmp_path).encode_prompt("a").tolist()
    assert (prompt[:1] == [0]) == (rule == "llama-bpe")
    with_key = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": True}
    assert gguf_tokenizer.unpack((fields | with_key).get, tmp_path)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("a").ids == [0, *library.encode("a", add_special_tokens=False).ids]
    for unknown in ({"tokenizer.ggml.pre": "new"}, {"tokenizer.ggml.model": "llama"}):
        assert not gguf_tokenizer.unpack((fields | unknown).get, tmp_path)


@needs_llama_cpp
@pytest.mark.parametrize("name", [*gguf_tokenizer._RULES, *gguf_tokenizer._ALIASES])
def test_rules_split_and_merge_as_those_of_llama_cpp(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bpe: Any = BPETokenizer(500).train([gguf_tokenizer._SAMPLE * 4])
    content = json.loads(bpe.library_json())
    merges = content["model"]["merges"]
    content["model"]["merges"] = merges[:-20]  # some words are tokens that nothing makes
    monkeypatch.setattr(bpe, "library_json", lambda: json.dumps(content))
    monkeypatch.setattr(gguf_tokenizer, "_nearest", lambda *_: (name, 0))
    model = models.build(folders.dense(vocab_size=500), NoMTPConfig())
    gguf_files.write(tmp_path / "m.gguf", model, bpe)
    fields = read_header(tmp_path / "m.gguf").fields | {gguf_tokenizer.WHOLE: None}
    texts = [*gguf_tokenizer._LINES, "1234567"]
    ours = unpacked(fields, tmp_path)
    theirs = tokenized(tmp_path / "m.gguf", texts)
    assert [ours.encode(text).tolist() for text in texts] == theirs


def tokenized(file: Path, texts: list[str]) -> list[list[int]]:
    """The ids of texts in llama.cpp."""
    parameters = llama_server.parameters(file, batch=1, tokens=32, threads=1)
    server = importlib.import_module("xllamacpp").Server(parameters)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answers = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        with opener.open(f"{server.listening_address}/tokenize", body) as answer:
            answers.append(json.load(answer)["tokens"])
    return answers


@pytest.mark.parametrize("unmerged", [True, False])
def test_a_tokenizer_of_llama_3s_rule_is_written_by_whether_it_merges_whole_tokens(
    unmerged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bpe: Any = BPETokenizer(500).train([gguf_tokenizer._SAMPLE * 4])
    content = json.loads(bpe.library_json())
    content |= {"pre_tokenizer": gguf_tokenizer._RULES["llama-bpe"], "normalizer": None}
    content["model"]["ignore_merges"] = unmerged
    for n_merges in (len(content["model"]["merges"]), 150):
        content["model"]["merges"] = content["model"]["merges"][:n_merges]
        monkeypatch.setattr(bpe, "library_json", lambda: json.dumps(content))
        fields, notes = gguf_tokenizer.to_fields(bpe, 500)
        assert fields["tokenizer.ggml.pre"] == ("llama-bpe" if unmerged else "smaug-bpe")
        assert not notes


def merge_by_scores(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: joins the leftmost pair with the highest score, again and again."""
    pieces = list(text)
    while pairs := [
        (scores[a + b], -i)
        for i, (a, b) in enumerate(itertools.pairwise(pieces))
        if a + b in scores
    ]:
        i = -max(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


@pytest.mark.parametrize("spaced", [True, False])
def test_sentencepiece_tokenizers_merge_by_scores(spaced: bool, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    letters = ["\u2581", *"abcdé"]
    pieces = dict.fromkeys(letters)
    while len(pieces) < 60:
        pieces |= dict.fromkeys(["".join(draw.choice(list(pieces), 2))])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(i) for i in draw.permutation(len(pieces))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    fields = {
        "model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds,
        "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": spaced,
    }  # fmt: skip
    keys = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    tokenizer = unpacked(keys, tmp_path)
    merged = {piece: scores[tokens.index(piece)] for piece in pieces if len(piece) > 1}
    for _ in range(200):
        text = "".join(draw.choice([*" abcdé", "z", "\n"], draw.integers(1, 12)))
        text_pieces = "\u2581" * spaced + text.replace(" ", "\u2581")
        expected = [
            i
            for piece in merge_by_scores(text_pieces, merged)
            for i in (
                [tokens.index(piece)] if piece in pieces else [3 + byte for byte in piece.encode()]
            )
        ]
        assert tokenizer.encode(text).tolist() == expected
        assert tokenizer.decode(expected) == text
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("a").ids[0] == 1  # llama.cpp's default for this kind
    # Written without the scores, only from the order of merges.
    exported, notes = gguf_tokenizer.to_fields(tokenizer, len(tokens) + 1)
    assert not notes and exported.pop(gguf_tokenizer.WHOLE)
    names = ("model", "token_type", "unknown_token_id", "eos_token_id", "add_space_prefix")
    for key in names:
        name = f"tokenizer.ggml.{key}"
        assert exported[name] == (keys[name] if key != "token_type" else [*kinds, 5]), key
    (tmp_path / "again").mkdir()
    again = unpacked(exported, tmp_path / "again")
    text = " ab  cd\u00e9 " * 3 + "z"
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    several = keys | {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 4}
    again = unpacked(several, tmp_path / "again")
    assert again.end_ids == (2, 5, 4)
    exported, _ = gguf_tokenizer.to_fields(again, len(tokens))
    assert all(exported[name] == several[name] for name in several if "_token_id" in name)
    (tmp_path / "fractions").mkdir()
    fractions = {f"tokenizer.ggml.{name}_token_id": 1.0 for name in ("bos", "unknown")}
    odd = unpacked(keys | fractions, tmp_path / "fractions")
    assert odd.encode_prompt("a").tolist() == odd.encode("a").tolist()  # without a first token
    broken = keys | {"tokenizer.ggml.scores": ["high"] * len(tokens)}
    assert not gguf_tokenizer.unpack(broken.get, tmp_path)


FILLING = [name for names in gguf_tokenizer._FILLING.values() for name in names]
NAMED: list[tuple[list[str], dict[str, int]]] = [
    (sorted(gguf_tokenizer._END_NAMES - {"<|end|>", "</s>"}), {}),
    (["<|end|>", "<|return|>", "</s>"], {}),
    (["<|end|>", "<|return|>", "<|calls|>"], {"eot": 0}),
    (["<|end|>", "<|call|>", "<|flush|>"], {}),
    (["</s>", "<|tool_response>", "<|end|>"], {}),
    (["<|fim_pad|>", "own", "<|file_sep|>", "<|fim_prefix|>", "<|user|>"], {"fim_pad": 1}),
    *(([name, "one", "two"], {}) for name in FILLING),
]


@needs_llama_cpp
@pytest.mark.parametrize(("names", "keys"), NAMED, ids=[names[0] for names, _ in NAMED])
def test_the_tokens_that_end_a_text_are_those_of_llama_cpp(
    names: list[str], keys: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(writer: Any) -> None:
        for role, i in keys.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", i)

    monkeypatch.setattr(gguf_files, "SPECIALS", [*names, "other"])
    file = write_gguf(tmp_path / "tiny.gguf", extra=named)
    ends = set(open_model(file).tokenizer.end_ids)
    parameters = llama_server.parameters(file, batch=1, tokens=32, threads=1)
    server, theirs = importlib.import_module("xllamacpp").Server(parameters), set()
    request = llama_server.request([40, 41], 2) | {"ignore_eos": False}
    for i in range(len(names) + 1):  # each in turn is the only choice
        answer = server.handle_completions(request | {"logit_bias": [[i, 1000.0]]})
        theirs |= {i} if answer["choices"][0]["finish_reason"] == "stop" else set()
    assert ends == theirs


def test_code_next_to_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads a tokenizer whose rule is unknown here. By default it would ask whether to
    run code that the files next to it name, and run it after "y"."""
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes().replace(b"smollm", b"llama4"))
    tokenizer = open_model(file).tokenizer
    assert tokenizer.vocab_size == len(SPECIALS) + len(WORDS)
    assert tokenizer.end_ids == (2, 0)  # as of a rule that is known
    (tmp_path / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    config = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(
        UserError, match="transformers reads no tokenizer from .*tiny.gguf"
    ) as error:
        open_model(file)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "The tokenizer m.gguf has no end-of-text token"),
        ({gguf_tokenizer.WHOLE: "{}"}, "m.gguf/tokenizer.json is not a tokenizer.json that can"),
        ({"tokenizer.ggml.merges": [1]}, "m.gguf/tokenizer.json is not a tokenizer.json that can"),
        ({"tokenizer.ggml.pre": "new"}, "m.gguf has tokenizer.ggml.pre=new, which names no rule"),
        ({"tokenizer.ggml.pre": None}, "m.gguf has tokenizer.ggml.pre=None, which names no rule"),
        ({"tokenizer.ggml.pre": ["a"]}, "m.gguf has tokenizer.ggml.pre=.*, which names no rule"),
    ],
)
def test_errors_of_a_tokenizer_name_its_file(changes: dict[str, Any], message: str) -> None:
    fields = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b"], "merges": []}
    header = Header({f"tokenizer.ggml.{k}": v for k, v in fields.items()} | changes, {})
    with pytest.raises(UserError, match=f"^{message}"):
        gguf_file.tokenizer_state(Path("m.gguf"), header)


def test_opening_reads_the_header_and_builds_the_tokenizer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, headers = write_gguf(tmp_path / "tiny.gguf"), []
    header = gguf_reader._Reader.header
    monkeypatch.setattr(gguf_reader._Reader, "header", lambda r: headers.append(0) or header(r))
    run = open_model(file)
    assert len(headers) == 1
    first = PretrainedTokenizer.from_state(run.tokenizer_state)
    assert first._library is run.tokenizer._library  # type: ignore[attr-defined]


def test_chat_template_and_special_tokens_are_exported(tmp_path: Path) -> None:
    """From a GGUF file through a checkpoint's state to a folder, and from there to another."""
    run = open_model(write_gguf(tmp_path / "tiny.gguf"))
    assert run.seq_len == 128
    assert run.tokenizer.end_ids == (2, 0)  # 0 by its name
    state = json.loads(json.dumps(run.tokenizer_state))
    tokenizer = tokenizer_from_state(state)
    assert tokenizer.encode("<|im_start|>").tolist() != [1], "in a text, names are text"
    assert tokenizer.encode_specials("<|im_start|>a").tolist()[0] == 1
    folders.write(tmp_path / "one", run.model, tokenizer, max_positions=128)
    again = open_model(tmp_path / "one")
    folders.write(tmp_path / "two", again.model, again.tokenizer, max_positions=128)
    assert folders.files(tmp_path / "one") == folders.files(tmp_path / "two")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "two")
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    fields = json.loads((tmp_path / "two" / "config.json").read_text())
    assert [fields[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [1, 2, 0]
    first = PretrainedTokenizer(str(tmp_path / "one"))
    files = {"tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert set(first.state()["beside"]) == files
    # AutoTokenizer reads tokenizer.json in Qwen3's layout, too, instead of Qwen2's rule.
    qwen3 = folders.random_model(folders.TRUNKS["qwen3"], NoMTPConfig())
    folders.write(tmp_path / "qwen3", qwen3, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "qwen3")
    assert type(theirs).__name__ == "TokenizersBackend"


def header_of(trunk: str, folder: Path, *, depth: int) -> Header:
    """The header of a file of a trunk of :data:`folders.TRUNKS` with MTP modules."""
    file = folder / "m.gguf"
    gguf_files.write(file, models.build(folders.TRUNKS[trunk], SequentialConfig(depth=depth)))
    return read_header(file)


@pytest.mark.parametrize(
    ("trunk", "key", "value", "message"),
    [
        ("qwen2", "qwen2.rope.dimension_count", 4, "has partial_rotary_factor=0.5, which this"),
        ("qwen2", "qwen2.attention.causal", False, "has is_causal=False, which this project"),
        ("llama", "llama.rope.scaling.type", "yarn", "stretched so are not read from GGUF"),
        # Older files name no type.
        ("llama", "llama.rope.scale_linear", 4.0, "stretched so are not read from GGUF"),
        # llama.cpp applies it whatever the type.
        ("llama", "llama.rope.scaling.attn_factor", 1.2, "stretched so are not read from GGUF"),
        ("deepseek-shared", "deepseek2.attention.temperature_scale", 0.1, "_scale=0.1, which this"),
        ("qwen3_moe", "qwen3moe.expert_group_count", 2, "count=2, which this .*_count=0[.]$"),
        ("glm4_moe", "glm4moe.rope.dimension_sections", [2, 1, 0, 1], "=.2, 1, 0, 1., which"),
        ("glm4_moe", "glm4moe.block_count", "three", "glm4moe.block_count=three, which is not a"),
        ("glm4_moe", "glm4moe.attention.head_count", [4, 4], "count=.4, 4., which is not a count"),
        ("glm4_moe", "glm4moe.attention.key_length", 0, "d_head"),
        ("glm4_moe", "glm4moe.nextn_predict_layers", 1 << 30, "n_layers|num_nextn_predict_layers"),
        ("glm4_moe", "glm4moe.attention.key_length", 1 << 40, "forged: it says head_dim"),
        ("glm4_moe", "glm4moe.leading_dense_block_count", 1 << 40, "says first_k_dense_replace"),
        # As in llama.cpp.
        ("glm4_moe", "glm4moe.expert_weights_norm", None, "has norm_topk_prob=False"),
        ("glm4_moe", "mtp_lightning.trunk", "deepseek_v3", "does not belong to the architecture"),
        ("glm4_moe", "general.architecture", "bert", "bert, which cannot be imported"),
        ("glm4_moe", "split.count", 2, "is one of 2 parts: join them"),
        ("glm4_moe", "split.count", "two", "is one of two parts: join them"),
    ],
)
def test_fields_of_other_models_and_forged_ones_are_refused(
    trunk: str, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    header = header_of(trunk, tmp_path, depth=1 if trunk == "glm4_moe" else 0)
    with pytest.raises(UserError, match=message):
        gguf_file.read(tmp_path / "m.gguf", Header({**header.fields, key: value}, header.tensors))


@pytest.mark.parametrize(
    ("trunk", "keys", "changes"),
    [
        ("deepseek-shared", {"deepseek2.attention.temperature_scale": 0.0}, {}),
        ("qwen3_moe", {"qwen3moe.expert_group_count": 0}, {}),
        ("glm4_moe", {"glm4moe.rope.dimension_sections": [2, 1, 1, 0]}, {}),
        ("glm4_moe", {"glm4moe.expert_weights_scale": 0.0}, {"scaling": 1.0}),
        ("glm4_moe", {"glm4moe.expert_group_count": 0, "glm4moe.expert_group_used_count": 0},
         {"n_groups": 1, "top_groups": 1}),
        ("glm4_moe", {"glm4moe.expert_gating_func": 0}, {}),  # a sigmoid
    ],
)  # fmt: skip
def test_zeros_of_mixtures_are_llama_cpps_defaults(
    trunk: str, keys: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    header = header_of(trunk, tmp_path, depth=0)
    _, config, _ = gguf_file.read(tmp_path / "m.gguf", Header(header.fields | keys, header.tensors))
    expected = folders.TRUNKS[trunk].to_dict()["feed_forward"] | changes
    assert config.trunk.to_dict()["feed_forward"] == expected


def test_divisors_of_frequencies_are_read_as_llama_3s_scaling(tmp_path: Path) -> None:
    """Computed as llama.cpp's converter does, from wavelengths."""
    config = transformers.LlamaConfig(
        head_dim=16, max_position_embeddings=128,
        rope_parameters={"rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0,
                         "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    )  # fmt: skip
    rotary = importlib.import_module("transformers.models.llama.modeling_llama")
    stretched = rotary.LlamaRotaryEmbedding(config).inv_freq.numpy()
    divisors = (50_000.0 ** -(np.arange(8) / 8) / stretched).astype(np.float32)
    assert divisors[0] == 1 and 1 < divisors[5] < 8 and divisors[7] == pytest.approx(8)

    def opened(numbers: Any) -> Any:
        def frequencies(writer: Any) -> None:
            writer.add_tensor("rope_freqs.weight", numbers)

        return read_folder(write_gguf(tmp_path / "tiny.gguf", extra=frequencies)).config.trunk

    divisors[-1] = 8.0
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert opened(divisors).rope_scaling == Llama3Scaling(**scaling, original_positions=8192)
    for others in (np.full(8, 2.0, np.float32), divisors * np.float32(1.001)):
        with pytest.raises(UserError, match=r"rope_freqs.weight is not Llama 3's: import the mod"):
            opened(others)
    for damaged in (np.full(8, np.nan, np.float32), divisors[:4], np.zeros(8, np.float32)):
        with pytest.raises(UserError, match=r"tiny\.gguf"):
            opened(damaged)


@pytest.mark.parametrize(
    ("version", "message"), [(b"\0\0\0\3", "is big-endian"), (b"\1\0\0\0", "is of version 1")]
)
def test_other_versions_are_refused(version: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + version + b"\0" * 40)
    with pytest.raises(UserError, match=rf"x.gguf is damaged or not a GGUF file: it {message}"):
        read_folder(tmp_path / "x.gguf")
    assert not is_gguf(tmp_path / "none.gguf")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"x.gguf is damaged .*blk.1.ffn_down.weight ends after it"):
        read_folder(file)


@pytest.mark.slow
@pytest.mark.skipif(
    not (smollm2.FOLDER / smollm2.MODEL).is_file(), reason="python -m data_modules.corpora.smollm2"
)
def test_drafts_do_not_change_the_greedy_texts_of_smollm2() -> None:
    run = open_model(smollm2.FOLDER / smollm2.MODEL)
    config = ModelConfig(trunk=run.model.config.trunk, mtp=SequentialConfig(depth=1))
    model = MTPModel(config)
    model.initialize(0)
    model.load_state_dict(run.model.state_dict(), strict=False)
    prompts = [run.tokenizer.encode(t).tolist() for t in ("def main():\n", "The sea is")]
    plain = generate(model, prompts, max_new_tokens=24, speculative=False)
    drafted = generate(model, prompts, max_new_tokens=24)
    require_same_greedy(model, prompts, plain, drafted)
    theirs = hf_model(smollm2.FOLDER / smollm2.MODEL)
    with torch.no_grad():
        expected = theirs(torch.tensor([prompts[0]])).logits
        batch = WindowBatch(torch.tensor([[*prompts[0], 0, 0]]), 1)
        logits = model.head(model(batch)[0])
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)

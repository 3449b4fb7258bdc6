"""``--against``: texts of other programs, compared with their plain ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mtp_lightning.certify.certificate import Certificate
from mtp_lightning.certify.others import PROGRAMS, Decoder, OtherProgram, compare_others

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def test_texts_that_differ_from_the_programs_plain_ones_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def decode(
        prompts: Sequence[Sequence[int]], length: int, *, batch: int = 1, wrong: bool = False
    ) -> list[list[int]]:
        texts = [[ids[0]] * length for ids in prompts]
        return [*texts[:-1], [0] * length] if wrong else texts

    decoder = Decoder("p 1", "fp32", decode, "luck", {"wrong": True})
    program = OtherProgram(
        "json", "none", lambda path: True, "anything", lambda path: iter([decoder])
    )
    monkeypatch.setitem(PROGRAMS, "p", program)
    count, batch = compare_others(["p"], Path("mine"), PROMPTS, 4)
    assert (count.texts, count.texts_equal, count.way) == (3, 2, "drafts by luck")
    assert (batch.texts, batch.texts_equal, batch.way) == (3, 3, "batch of 8")
    certificate = Certificate("m", {}, False, [], [count])
    assert "p 1, fp32, drafts by luck: 2/3 texts equal its plain ones" in list(certificate.lines())
    (stored,) = json.loads(json.dumps(certificate.to_json()))["others"]
    assert stored == {
        **{"program": "p 1", "weights": "fp32", "way": "drafts by luck"},
        **{"texts": 3, "texts_equal": 2},
    }
    assert certificate.broken() == []  # the certificate is about this project's decoding


def test_a_program_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoders(path: Path) -> Iterator[Decoder]:
        yield Decoder("p 1", "fp32", lambda ids, length, **_: ids, "luck", {})
        raise ValueError("GGUF of glm4moe is not supported.\nDetails")

    program = OtherProgram("json", "none", lambda path: True, "anything", decoders)
    monkeypatch.setitem(PROGRAMS, "p", program)
    said: list[str] = []
    counts = compare_others(["p"], Path("mine"), PROMPTS, 4, said.append)
    assert [count.texts_equal for count in counts] == [3, 3]
    reason = "GGUF of glm4moe is not supported."
    assert said[1:] == [f"p cannot decode mine and is left out from here on: {reason}"]


@pytest.mark.extras
def test_transformers_decodes_the_same_texts_in_fp32_on_a_small_llama(tmp_path: Path) -> None:
    """With real drafts by prompt lookup."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    counts = compare_others(["transformers"], tmp_path, PROMPTS, 12)
    assert [(count.weights, count.way) for count in counts] == [
        (weights, name)
        for weights in ("fp32", "bf16")
        for name in ("drafts by prompt lookup", "batch of 8")
    ]
    assert all(count.texts == 3 for count in counts)
    assert all(count.texts_equal == 3 for count in counts[:2])
    fp32, _ = PROGRAMS["transformers"].decoders(tmp_path)
    texts = fp32.decode(PROMPTS, 5)
    assert [len(ids) for ids in texts] == [5, 5, 5]
    assert fp32.decode(PROMPTS, 5, **fp32.drafts) == texts
    ends = {"eos_token_id": texts[0][1], "repetition_penalty": 1.5}
    transformers.GenerationConfig(**ends).save_pretrained(tmp_path)
    fp32, _ = PROGRAMS["transformers"].decoders(tmp_path)
    assert fp32.decode(PROMPTS, 5) == texts  # the model's generation settings are not used


@pytest.mark.extras
def test_transformers_decodes_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from tests.interop.gguf_files import write_gguf

    counts = compare_others(["transformers"], write_gguf(tmp_path / "small.gguf"), PROMPTS, 8)
    assert [count.texts_equal for count in counts[:2]] == [3, 3]


@pytest.mark.extras
def test_llama_cpp_decodes_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs pip install -e '.[engines]'")
    pytest.importorskip("gguf")
    from tests.interop.gguf_files import write_gguf

    file = write_gguf(tmp_path / "small.gguf")
    counts = compare_others(["llama.cpp"], file, PROMPTS, 8)
    assert [count.way for count in counts] == ["drafts by n-grams", "batch of 8"]
    assert all(count.texts == 3 for count in counts)
    (decoder,) = PROGRAMS["llama.cpp"].decoders(file)
    assert [len(ids) for ids in decoder.decode(PROMPTS, 5)] == [5, 5, 5]

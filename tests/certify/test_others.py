"""``--against``: texts of other programs, compared with their plain ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mtp_lightning.certify.certificate import Certificate
from mtp_lightning.certify.others import PROGRAMS, OtherProgram, Way, compare_others

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def test_texts_that_differ_from_the_programs_plain_ones_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def plain(prompts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
        return [[ids[0]] * length for ids in prompts]

    def wrong_once(prompts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
        return [*plain(prompts, length)[:-1], [0] * length]

    ways = [Way("p 1", "fp32", "plain", plain), Way("p 1", "fp32", "drafts", wrong_once)]
    program = OtherProgram("json", "none", lambda path: True, "anything", lambda path: iter([ways]))
    monkeypatch.setitem(PROGRAMS, "p", program)
    (count,) = compare_others(["p"], Path("mine"), PROMPTS, 4)
    assert (count.texts, count.texts_equal, count.way) == (3, 2, "drafts")
    certificate = Certificate("m", {}, False, [], [count])
    assert "p 1, fp32, drafts: 2/3 texts equal its plain ones" in list(certificate.lines())
    (stored,) = json.loads(json.dumps(certificate.to_json()))["others"]
    assert stored == {
        **{"program": "p 1", "weights": "fp32", "way": "drafts"},
        **{"texts": 3, "texts_equal": 2},
    }
    assert certificate.broken() == []  # the certificate is about this project's decoding


def test_a_program_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def ways(path: Path) -> Iterator[list[Way]]:
        same = [Way("p 1", "fp32", name, lambda ids, length: ids) for name in ("plain", "drafts")]
        yield same
        raise ValueError("GGUF of glm4moe is not supported.\nDetails")

    program = OtherProgram("json", "none", lambda path: True, "anything", ways)
    monkeypatch.setitem(PROGRAMS, "p", program)
    said: list[str] = []
    (count,) = compare_others(["p"], Path("mine"), PROMPTS, 4, said.append)
    assert count.texts_equal == 3
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
    (plain, looked_up, _), _ = PROGRAMS["transformers"].ways(tmp_path)
    texts = plain.decode(PROMPTS, 5)
    assert [len(ids) for ids in texts] == [5, 5, 5] and looked_up.decode(PROMPTS, 5) == texts
    ends = {"eos_token_id": texts[0][1], "repetition_penalty": 1.5}
    transformers.GenerationConfig(**ends).save_pretrained(tmp_path)
    (plain, *_), _ = PROGRAMS["transformers"].ways(tmp_path)
    assert plain.decode(PROMPTS, 5) == texts  # the model's generation settings are not used


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
    ((plain, *_),) = PROGRAMS["llama.cpp"].ways(file)
    assert [len(ids) for ids in plain.decode(PROMPTS, 5)] == [5, 5, 5]

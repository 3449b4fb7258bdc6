"""Models that only decode, and keep their weights in packed form alone: the same numbers in less
memory."""

from __future__ import annotations

import functools
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_modules.seal import seal
from mtp_lightning.cpu import packed, packed_cache
from mtp_lightning.cpu.packed import Kind, only_copy, packed_weight, replace_by_packed
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.fused import packer_for
from mtp_lightning.decoding.precision import (
    packer_after_rounding,
    round_weights,
    roundings_of,
)
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.nn.weight_scales import WeightScales
from tests.decoding.models import ids_of, random_prompts, small_model
from tests.kernels import k_quants, use_library
from tests.models import as_stored

pytestmark = pytest.mark.usefixtures("built_library")

PRECISIONS = {"fp32": Kind.FULL, "bf16": Kind.BF16, "int8": Kind.BYTE, "int4": Kind.BLOCKS4}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 64), (33, 32), (70, 96), (200, 64), (130, 17)])
def test_a_packed_weight_unpacks_to_the_same_bits(shape, precision):
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    round_weights(layer, roundings_of(layer, precision))
    weight, packed_copy = layer.weight.data, packed_weight(layer.weight)
    if shape[1] % 32 == 0:
        assert packed_copy.kind == PRECISIONS[precision]
    assert torch.equal(packed_copy.unpacked(), weight)
    ids = torch.randint(0, shape[0], (3, 5))
    assert torch.equal(packed_copy.rows(ids), weight[ids])
    assert torch.equal(packed_copy.rows(ids.int()), weight[ids])  # nn.Embedding takes them, too
    with pytest.raises(IndexError, match="outside of 0"):
        packed_copy.rows(torch.tensor([shape[0]]))
    replace_by_packed(layer.weight)
    assert only_copy(layer.weight) is not None
    assert layer.weight.untyped_storage().nbytes() == 0


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (5, 32), (6, 16)])
def test_the_scales_of_a_gguf_file_pack_a_weight_without_loss(bits, group):
    factors = (torch.rand(2, 70, 1) * 1e-3).half().float()
    weight, scales = k_quants((70, 128), bits, group, factors)
    scaled, plain = packed_weight(weight, scales), packed_weight(weight)
    assert scaled.kind == (Kind.BLOCKS4_FULL if bits == 4 else Kind.BLOCKS8_FULL)
    assert plain.kind == Kind.FULL and torch.equal(scaled.unpacked(), weight)
    for rows in (1, 3, 9):
        x = torch.randn(rows, 128)
        assert torch.equal(scaled.linear(x), plain.linear(x))
    order = torch.randperm(70).tolist()
    parts = [
        WeightScales(steps=scales.steps[of], offsets=scales.offsets[of], group=group, bits=bits)
        for of in (slice(0, 20), slice(20, None))
    ]
    reordered = packed_weight(weight[order].clone(), WeightScales.joined(parts, order))
    assert reordered.kind == scaled.kind and torch.equal(reordered.unpacked(), weight[order])
    changed = weight.clone()
    changed[69, 127] += 1
    assert packed_weight(changed, scales).kind == Kind.FULL


def opened_as_generate(model: MTPModel) -> MTPModel:
    return as_stored(model).build(packer_for)


def packed_only(model: MTPModel) -> MTPModel:
    """The model as generate.py opens it, with most of its numbers in packed form alone."""
    light = opened_as_generate(model)
    sizes = [(weight.numel(), only_copy(weight) is not None) for weight in light.parameters()]
    assert sum(n for n, is_packed in sizes if is_packed) > sum(n for n, _ in sizes) / 2
    return light


def assert_same_texts(
    model: MTPModel, light: MTPModel, lengths: tuple[int, ...] = (5, 20), **options: Any
) -> None:
    """Both models generate the same texts, with the same accepted drafts."""
    prompts = random_prompts(4, lengths, model.config.trunk.vocab_size)
    options = {"max_new_tokens": 12, **options}
    expected, texts = (generate(m, prompts, **options) for m in (model, light))
    assert ids_of(texts) == ids_of(expected), options
    assert [g.accepted_mask for g in texts] == [g.accepted_mask for g in expected], options


STACKS = {
    "sequential": {},
    "recursive": {"share_layers": True},
    "parallel": {"stack": "parallel"},
    "masked": {"stack": "masked"},
    "eagle": {"stack": "eagle"},
    "dflash": {"stack": "dflash"},
}


@pytest.mark.parametrize(
    ("stack", "tied"), [("sequential", True), *((stack, False) for stack in STACKS)]
)
def test_a_model_with_packed_weights_alone_decodes_the_same_texts(stack, tied):
    model = small_model(3, 2, vocab=300, **STACKS[stack])
    if tied:
        trunk = replace(model.config.trunk, tie_embeddings=True)
        model = MTPModel(ModelConfig(trunk=trunk, mtp=model.config.mtp)).eval()
        model.initialize(3)
    light = packed_only(model)
    all_options = [{}, {"speculative": False}, {"temperature": 1.0, "seed": 1}]
    if stack == "sequential":
        all_options += [{"draft_vocab": 70}, {"draft_vocab": 128}, {"tree": [2, 2]}]
    for options in all_options:
        assert_same_texts(model, light, (5, 1, 30), **options)
    if stack == "sequential":  # the numbers of drafts depend on the clock
        prompts = random_prompts(4, (5, 1, 30), 300)
        expected, texts = (
            generate(m, prompts, max_new_tokens=12, draft_depth="auto") for m in (model, light)
        )
        assert ids_of(texts) == ids_of(expected)


def test_a_long_prompt_gives_the_same_text_with_packed_weights():
    model = small_model(5, 1, vocab=300)
    assert_same_texts(model, packed_only(model), (700,), max_new_tokens=6)


@pytest.mark.parametrize("stack", STACKS)
def test_drafts_of_many_rows_are_multiplied_by_the_packed_weights(stack, monkeypatch):
    """To unpack a head for each draft would take longer than the draft."""
    light = packed_only(small_model(3, 2, vocab=300, **STACKS[stack]))
    monkeypatch.delattr(packed.PackedWeight, "unpacked")
    texts = generate(light, [[token] for token in range(17)], batch_size=17, max_new_tokens=5)
    assert all(text.drafts_reached[0] for text in texts)


def test_weights_that_other_code_reads_are_not_packed():
    model = small_model(1, 1, deepseek=True)
    light = opened_as_generate(model)
    for block in light.trunk.blocks:
        assert all(only_copy(weight) is None for weight in block.parameters())
    assert_same_texts(model, light)


def test_without_the_library_no_weight_is_packed(monkeypatch):
    use_library(monkeypatch, None)
    assert packer_for(small_model(1, 1)) is None


def test_weights_in_float64_are_not_packed():
    model = small_model(1, 1).double()
    light = opened_as_generate(model)
    assert all(only_copy(weight) is None for weight in light.parameters())
    assert torch.equal(light.head.weight, model.head.weight)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A model, its file, and a function that opens it and shares its packed weights in the
    cache."""
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_cache, "LEAST", 0)
    model, path = small_model(3, 1, vocab=300), tmp_path / "model.ckpt"
    path.write_bytes(b"numbers")

    def opened() -> MTPModel:
        return as_stored(model).build(functools.partial(packer_for, path=path))

    return model, path, opened


def test_a_second_process_maps_the_packed_weights_of_the_first(cached, monkeypatch, tmp_path):
    model, path, opened = cached
    first = opened()
    (folder,) = (tmp_path / "cache").glob("packed*/*")

    def fails(*args):
        raise AssertionError("packed again")

    with monkeypatch.context() as patch:
        patch.setattr(packed, "packed_weight", fails)
        second = opened()
    for light in (first, second):
        assert_same_texts(model, light)
    for (name, weight), (_, mapped) in zip(
        first.named_parameters(), second.named_parameters(), strict=True
    ):
        assert (only_copy(weight) is None) == (only_copy(mapped) is None), name
    os.utime(path, ns=(1, 1))
    opened()
    (new_folder,) = (tmp_path / "cache").glob("packed*/*")
    assert new_folder != folder  # for the changed file; the old one is removed


def test_packed_weights_that_nobody_opened_for_a_month_are_removed(cached, tmp_path):
    *_, opened = cached
    for name in ("packed_native/1-2", "packed_of_older_versions/3-4", "stores/5"):
        (tmp_path / "cache" / name).mkdir(parents=True)
        os.utime(tmp_path / "cache" / name, (0, 0))
    opened()
    (kept,) = (tmp_path / "cache").glob("packed*/*")
    os.utime(kept, (0, 0))
    opened()
    assert kept.stat().st_mtime > time.time() - 3600 and (tmp_path / "cache/stores/5").is_dir()


def test_each_rounding_has_packed_weights_of_its_own(cached, tmp_path):
    model, path, _ = cached
    numbers = {}
    for rounding in [("fp32", None), ("fp32", "int8"), ("bf16", None)] * 2:
        at_path = functools.partial(packer_after_rounding(*rounding), path=path)
        light = as_stored(model).build(at_path)
        read = [packed.unpacked_weight(weight) for weight in light.parameters()]
        assert all(map(torch.equal, read, numbers.setdefault(rounding, read)))
        assert len(list((tmp_path / "cache").glob("packed*/*"))) == len(numbers)
    assert not all(map(torch.equal, *list(numbers.values())[:2]))


@pytest.mark.parametrize("damage", ["bytes", "index", "shape", "shorter"])
def test_damaged_packed_weights_are_packed_again(damage, cached, tmp_path):
    model, _, opened = cached
    opened()
    (folder,) = (tmp_path / "cache").glob("packed*/*")
    numbers, index = folder / "packed.bin", folder / "index.json"
    if damage == "bytes":
        numbers.write_bytes(bytes([numbers.read_bytes()[0] ^ 1]) + numbers.read_bytes()[1:])
    elif damage == "index":
        index.write_text("[")
    else:  # the digests do not show the damage
        entries = json.loads(index.read_text())
        field, more = (1, -1) if damage == "shape" else (0, 1 << 20)
        entries["trunk.embedding.weight"][field] += more
        index.write_text(json.dumps(entries))
        (folder / "digests.json").unlink()
        seal(folder)
    for name, weight in opened().named_parameters():
        assert torch.equal(packed.unpacked_weight(weight), model.get_parameter(name)), name
    assert len(list((tmp_path / "cache").glob("packed*/*"))) == 1


def test_damaged_packed_weights_that_cannot_be_removed_stop_nothing(cached, tmp_path, monkeypatch):
    model, _, opened = cached
    opened()
    (numbers,) = (tmp_path / "cache").glob("packed*/*/packed.bin")
    numbers.write_bytes(bytes([numbers.read_bytes()[0] ^ 1]) + numbers.read_bytes()[1:])
    monkeypatch.setattr("shutil.rmtree", lambda *args, **options: None)  # as in a read-only cache
    assert_same_texts(model, opened())


def test_packed_weights_of_a_cache_that_cannot_be_read_are_packed_again(cached, monkeypatch):
    model, _, opened = cached
    opened()
    functions, refused = {name: getattr(Path, name) for name in ("is_dir", "read_text")}, set()

    def call(name: str, path: Path, *rest: str) -> Any:
        if not any(part.startswith("packed_") for part in path.parts):
            return functions[name](path, *rest)
        refused.add(name)
        raise PermissionError(13, "Permission denied", str(path))

    for name in functions:
        monkeypatch.setattr(Path, name, lambda path, *rest, name=name: call(name, path, *rest))
    assert_same_texts(model, opened())
    assert "is_dir" in refused


def test_packed_weights_of_a_small_model_are_not_cached(cached, monkeypatch, tmp_path):
    *_, opened = cached
    monkeypatch.undo()
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path / "cache"))
    opened()
    assert not (tmp_path / "cache").exists()

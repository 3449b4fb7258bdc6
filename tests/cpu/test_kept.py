"""A model that only decodes and keeps its packed weights alone: the same numbers in less memory."""

from __future__ import annotations

import copy
import functools
import json
import os
from dataclasses import replace

import pytest
import torch

from mtp_lightning.cpu import kept as kept_weights
from mtp_lightning.cpu import packed
from mtp_lightning.cpu.packed import Kind, is_kept, keep_packed, packed_weight
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.fused import packer_for
from mtp_lightning.decoding.precision import use_precision
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.nn.weight_scales import WeightScales
from mtp_lightning.opening import build_model
from tests.decoding.models import ids_of, random_prompts, small_model
from tests.kernels import k_quants, use_library

pytestmark = pytest.mark.usefixtures("own")

PRECISIONS = {"fp32": Kind.FULL, "bf16": Kind.HALF, "int8": Kind.BYTE, "int4": Kind.BLOCKS4}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 64), (33, 32), (70, 96), (200, 64), (130, 17)])
def test_a_packed_weight_has_every_bit(shape, precision):
    from mtp_lightning.decoding.precision import round_weights

    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    round_weights(layer, precision)
    weight, found = layer.weight.data, packed_weight(layer.weight)
    if shape[1] % 32 == 0:
        assert found.kind == PRECISIONS[precision]
    assert torch.equal(found.unpacked(), weight)
    ids = torch.randint(0, shape[0], (3, 5))
    assert torch.equal(found.rows(ids), weight[ids])
    assert torch.equal(found.rows(ids.int()), weight[ids])  # as nn.Embedding also takes them
    with pytest.raises(IndexError, match="outside of 0"):
        found.rows(torch.tensor([shape[0]]))
    keep_packed(layer.weight)
    assert is_kept(layer.weight)
    assert layer.weight.untyped_storage().nbytes() == 0


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (5, 32), (6, 16)])
def test_a_weight_is_packed_by_given_scales(bits, group):
    factors = (torch.rand(2, 70, 1) * 1e-3).half().float()
    weight, scales = k_quants((70, 128), bits, group, factors)
    found, plain = packed_weight(weight, scales), packed_weight(weight)
    assert found.kind == (Kind.BLOCKS4_FULL if bits == 4 else Kind.BLOCKS8_FULL)
    assert plain.kind == Kind.FULL and torch.equal(found.unpacked(), weight)
    for rows in (1, 3, 9):
        x = torch.randn(rows, 128)
        assert torch.equal(found.linear(x), plain.linear(x))
    order = torch.randperm(70).tolist()
    parts = [
        WeightScales(steps=scales.steps[of], offsets=scales.offsets[of], group=group, bits=bits)
        for of in (slice(0, 20), slice(20, None))
    ]
    turned = packed_weight(weight[order].clone(), WeightScales.joined(parts, order))
    assert turned.kind == found.kind and torch.equal(turned.unpacked(), weight[order])
    other = weight.clone()
    other[69, 127] += 1
    assert packed_weight(other, scales).kind == Kind.FULL


def kept(model: MTPModel) -> MTPModel:
    """The model as generate.py opens it, and at least half of its numbers in packed form alone."""
    found = build_model(model.config, model.state_dict(), source="here", packer_for=packer_for)
    sizes = [(weight.numel(), is_kept(weight)) for weight in found.parameters()]
    assert sum(n for n, without in sizes if without) > sum(n for n, _ in sizes) / 2
    return found


STACKS = {
    "sequential": {},
    "recursive": {"share_layers": True},
    "parallel": {"stack": "parallel"},
    "masked": {"stack": "masked"},
    "eagle": {"stack": "eagle"},
}


@pytest.mark.parametrize(
    ("stack", "tied"), [("sequential", True), *((stack, False) for stack in STACKS)]
)
def test_it_decodes_to_the_same_bits(stack, tied):
    model = small_model(3, 2, vocab=300, **STACKS[stack])
    if tied:
        trunk = replace(model.config.trunk, tie_embeddings=True)
        model = MTPModel(ModelConfig(trunk=trunk, mtp=model.config.mtp)).eval()
        model.initialize(3)
    light = kept(model)
    prompts = random_prompts(4, (5, 1, 30), 300)
    ways = [{}, {"speculative": False}, {"temperature": 1.0, "seed": 1}]
    if stack == "sequential":
        ways += [
            {"draft_vocab": 70},
            {"draft_vocab": 128},
            {"tree": [2, 2]},
            {"draft_depth": "auto"},
        ]
    for way in ways:
        expected, found = (generate(m, prompts, max_new_tokens=12, **way) for m in (model, light))
        assert ids_of(found) == ids_of(expected), way
        assert [g.accepted_mask for g in found] == [g.accepted_mask for g in expected], way


def test_a_long_prompt_is_read_by_the_same_products():
    model = small_model(5, 1, vocab=300)
    light = kept(model)
    (prompt,) = random_prompts(1, (700,), 300)
    expected, found = (generate(m, [prompt], max_new_tokens=6)[0] for m in (model, light))
    assert found.token_ids == expected.token_ids


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_rounded_weights_are_kept_as_well(precision):
    model = small_model(2, 2, vocab=300)
    use_precision(model, precision)
    light = copy.deepcopy(model)
    packer = packer_for(light)
    for weight in light.parameters():
        packer.pack(weight)
    prompts = random_prompts(4, (5, 20), 300)
    expected, found = (generate(m, prompts, max_new_tokens=12) for m in (model, light))
    assert ids_of(found) == ids_of(expected)


def test_weights_that_are_read_otherwise_stay():
    model = small_model(1, 1, deepseek=True)
    light = build_model(model.config, model.state_dict(), source="here", packer_for=packer_for)
    for block in light.trunk.blocks:
        assert not any(is_kept(weight) for weight in block.parameters())
    prompts = random_prompts(4, (5, 20))
    expected, found = (generate(m, prompts, max_new_tokens=12) for m in (model, light))
    assert ids_of(found) == ids_of(expected)


def test_without_the_library_nothing_is_kept(monkeypatch):
    use_library(monkeypatch, None)
    assert packer_for(small_model(1, 1)) is None


def test_a_model_of_float64_stays():
    model = small_model(1, 1).double()
    light = build_model(model.config, model.state_dict(), source="here", packer_for=packer_for)
    assert not any(is_kept(weight) for weight in light.parameters())
    assert torch.equal(light.head.weight, model.head.weight)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A model in a file, and what opens it: its weights are kept for other processes."""
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_weights, "LEAST", 0)
    model, path = small_model(3, 1, vocab=300), tmp_path / "model.ckpt"
    path.write_bytes(b"its numbers")

    def opened() -> MTPModel:
        at_path = functools.partial(packer_for, path=path)
        return build_model(model.config, model.state_dict(), source="here", packer_for=at_path)

    return model, path, opened


def test_a_second_process_maps_what_the_first_one_packed(cached, monkeypatch, tmp_path):
    model, path, opened = cached
    first = opened()
    (folder,) = (tmp_path / "cache" / "packed").iterdir()

    def fails(*args):
        raise AssertionError("packed again")

    with monkeypatch.context() as patch:
        patch.setattr(packed, "packed_weight", fails)
        second = opened()
    prompts = random_prompts(4, (5, 20), 300)
    texts = [generate(m, prompts, max_new_tokens=12) for m in (model, first, second)]
    assert [ids_of(text) for text in texts[1:]] == [ids_of(texts[0])] * 2
    for (name, weight), (_, other) in zip(
        first.named_parameters(), second.named_parameters(), strict=True
    ):
        assert is_kept(weight) == is_kept(other), name
    os.utime(path, ns=(1, 1))
    opened()
    (other,) = (tmp_path / "cache" / "packed").iterdir()
    assert other != folder  # the file changed, and what was packed of its old state is gone


@pytest.mark.parametrize("harm", ["bytes", "index", "shape", "shorter"])
def test_damaged_packed_weights_are_made_again(harm, cached, tmp_path):
    model, _, opened = cached
    opened()
    (folder,) = (tmp_path / "cache" / "packed").iterdir()
    numbers, index = folder / "packed.bin", folder / "index.json"
    if harm == "bytes":
        numbers.write_bytes(bytes([numbers.read_bytes()[0] ^ 1]) + numbers.read_bytes()[1:])
    elif harm == "index":
        index.write_text("[")
    else:  # as another program would seal it
        found = json.loads(index.read_text())
        name = "trunk.embedding.weight"
        found[name][1 if harm == "shape" else 0] += 1 << 20
        index.write_text(json.dumps(found))
        (folder / "digests.json").unlink()
    again = opened()
    for name, weight in again.named_parameters():
        assert torch.equal(packed.numbers_of(weight), model.get_parameter(name)), name
    assert len(list((tmp_path / "cache" / "packed").iterdir())) == 1


def test_a_small_model_leaves_the_cache_alone(cached, monkeypatch, tmp_path):
    *_, opened = cached
    monkeypatch.undo()
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path / "cache"))
    opened()
    assert not (tmp_path / "cache").exists()

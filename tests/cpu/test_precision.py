"""``precision``: every pass decodes with the rounded weights, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

from mtp_lightning.cpu.packed import Kind, only_copy, packed_copy, unpacked_weight
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.fused import decoding_passes, fused_passes
from mtp_lightning.decoding.precision import round_weights, roundings_of, use_precision
from mtp_lightning.decoding.session import Session
from mtp_lightning.experiment import generating
from tests.decoding.models import (
    assert_wide_passes_have_the_bits_of_single_ones,
    ids_of,
    random_prompts,
    small_model,
    steer_drafts,
)
from tests.kernels import use_library

pytestmark = pytest.mark.usefixtures("built_library")

NEW = 14


# The kinds of the head and of a projection of 64 inputs.
KINDS = {
    "bf16": (Kind.BF16, Kind.BF16),
    "int8": (Kind.BYTE, Kind.BYTE),
    "int4": (Kind.BYTE, Kind.BLOCKS4),
}
ROUNDED = pytest.mark.parametrize("precision", KINDS)


def rounded(precision: str, seed: int, depth: int, **mtp):
    model = small_model(seed, depth, **mtp)
    use_precision(model, precision)
    return model


@pytest.mark.parametrize(
    ("precision", "deepseek"), [("bf16", False), ("int8", True), ("int4", False)]
)
def test_drafts_give_the_rounded_models_plain_text(deepseek, precision, monkeypatch):
    model = rounded(precision, 4, 2, deepseek=deepseek)
    prompts = random_prompts(4, (5, 1, 13))
    options = {"max_new_tokens": NEW}
    expected = ids_of(generate(model, prompts, speculative=False, **options))
    assert ids_of(generate(model, prompts, **options)) == expected
    with monkeypatch.context() as patch:
        steer_drafts(patch, prompts, expected, chance=0.6, seed=1)
        together = generate(model, prompts, **options)
        assert ids_of(together) == expected
        assert any(any(g.accepted_mask) for g in together)
    # PyTorch's operators decode the same text with the rounded weights in fp32.
    use_library(monkeypatch, None)
    assert ids_of(generate(model, prompts, **options)) == expected


@ROUNDED
@pytest.mark.parametrize(("deepseek", "n_threads", "rows"), [(False, 1, 7), (True, 2, 1)])
def test_a_verify_pass_gives_the_bits_of_single_passes(deepseek, n_threads, rows, precision):
    model = rounded(precision, 3, 2, deepseek=deepseek)
    with fused_passes(model):
        weights = model.head.weight, model.mtp.module(1).eh_proj.weight
        assert tuple(packed_copy(weight).kind for weight in weights) == KINDS[precision]
    assert_wide_passes_have_the_bits_of_single_ones(model, n_threads=n_threads, rows=rows)


@pytest.mark.parametrize("mtp", [{}, {"stack": "linear", "rank": 2}], ids=str)
def test_a_prompts_logits_have_the_same_bits_next_to_longer_prompts(mtp):
    """A product in int8 is scaled at its end, one with the unpacked weight is not."""
    model = rounded("int8", 3, 2, **mtp)
    prompts = random_prompts(3, (3, 9, 40, 25, 5))
    with decoding_passes(model):
        sessions = [Session(model, slots=5, capacity=48, max_draft=2) for _ in range(6)]
        alone = [s.join([ids]) for s, ids in zip(sessions, prompts, strict=False)]
        assert torch.equal(sessions[-1].join(prompts), torch.cat(alone))


@ROUNDED
def test_only_matrices_are_rounded_and_they_are_packed_in_fewer_bytes(precision):
    model = small_model(2, 1)
    before = copy.deepcopy(model)
    use_precision(model, "fp32")
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)
    with fused_passes(model):
        assert packed_copy(model.head.weight).kind == Kind.FULL
    use_precision(model, precision)
    if precision == "bf16":
        assert torch.equal(model.head.weight, before.head.weight.bfloat16().float())
    assert not torch.equal(model.head.weight, before.head.weight)
    assert torch.equal(model.trunk.norm.weight, before.trunk.norm.weight)
    with fused_passes(model):
        assert packed_copy(model.head.weight).kind == KINDS[precision][0]
        assert "forward" in vars(model.trunk)


def test_int4_rounds_to_the_nearest_of_16_levels_per_block_of_32_inputs():
    layer = torch.nn.Linear(96, 70, bias=False)
    weight = torch.randn(70, 96) * torch.logspace(-3, 3, 70).unsqueeze(1)
    weight[5], weight[6, 1:], weight[7] = 0.0, 0.0, 0.25
    layer.weight.data = weight.clone()
    round_weights(layer, roundings_of(layer, "int4"))
    int4 = layer.weight.data.double().unflatten(1, (3, 32))
    blocks = weight.double().unflatten(1, (3, 32))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    # Half a step, and the errors of the step and of the smallest number, which are in fp16.
    allowed = (high - low) / 15 * (0.5 + 15 * 2**-11) + low.abs() * 2**-11 + 2**-24
    assert ((int4 - blocks).abs() <= allowed).all()
    assert all(len(row.unique()) <= 16 for row in int4.flatten(0, 1))
    assert torch.equal(int4[5], torch.zeros(3, 32, dtype=torch.float64))
    layer.weight.data[3, 40] = float("nan")
    round_weights(layer, roundings_of(layer, "int4"))
    assert layer.weight.data[3, 32:64].isnan().all() and layer.weight.data.isnan().sum() == 32


@pytest.mark.parametrize("heads", ["fp32", "int4"])
def test_head_precision_changes_only_the_modules_and_not_the_text(heads):
    same, different = small_model(6, 2), small_model(6, 2)
    use_precision(same, "int8")
    use_precision(different, "int8", heads)
    parameters = different.named_parameters()
    changed = {n for n, p in parameters if not torch.equal(p, same.get_parameter(n))}
    assert {"mtp.depths.0.eh_proj.weight", "mtp.depths.1.eh_proj.weight"} <= changed
    assert all(name.startswith("mtp.") for name in changed)
    prompts = random_prompts(6, (5, 9))
    texts = [ids_of(generate(m, prompts, max_new_tokens=NEW)) for m in (same, different)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("heads", [None, "fp32", "int8", "int4", "auto"])
def test_weights_that_are_rounded_while_they_are_read_have_the_same_numbers(
    precision, heads, opened
):
    expected = small_model(2, 1)
    as_settled = {"auto": "int8" if precision in ("fp32", "bf16") else None}
    use_precision(expected, precision, as_settled.get(heads, heads))
    packed = opened(precision=precision, head_precision=heads)
    assert (
        sum(only_copy(p) is not None for p in packed.mtp.parameters()) >= 5
    )  # of the block, and eh_proj
    for name, parameter in packed.named_parameters():
        assert torch.equal(unpacked_weight(parameter), expected.get_parameter(name)), name


def test_automatic_head_precision_changes_nothing_where_it_gains_nothing(opened, monkeypatch):
    plain = small_model(2, 1)
    for settings in ({"compile": True}, {"library": None}):
        if "library" in settings:
            use_library(monkeypatch, settings.pop("library"))
        for name, parameter in opened(head_precision="auto", **settings).named_parameters():
            assert torch.equal(parameter, plain.get_parameter(name))


def test_unknown_precisions_and_those_of_missing_modules_are_refused():
    with pytest.raises(ValueError, match="head_precision=int8 .* has none: leave it out"):
        use_precision(small_model(2, 0), "fp32", "int8")
    with pytest.raises(ValueError, match="precision=int2 is unknown"):
        use_precision(small_model(2, 1), "int2")


def test_int4_keeps_eight_bits_in_the_embedding_and_the_head():
    models = [small_model(2, 1) for _ in range(2)]
    for model, precision in zip(models, ("int8", "int4"), strict=True):
        use_precision(model, precision)
    int8, int4 = models
    assert torch.equal(int4.head.weight, int8.head.weight)
    assert torch.equal(int4.trunk.embedding.weight, int8.trunk.embedding.weight)
    assert not torch.equal(int4.mtp.module(1).eh_proj.weight, int8.mtp.module(1).eh_proj.weight)


def test_generate_opens_models_with_a_precision_or_refuses_it(opened, monkeypatch):
    weight = unpacked_weight(opened(precision="bf16").head.weight)
    assert torch.equal(weight, weight.bfloat16().float())
    monkeypatch.setattr(generating, "open_model", None)  # refused before a model is read
    with pytest.raises(ValueError, match="precision=bf16 does not go together with compile=true"):
        opened(precision="bf16", compile=True)
    with pytest.raises(ValueError, match="precision=int2 is unknown"):
        opened(precision="int2")
    use_library(monkeypatch, None)
    with pytest.raises(ValueError, match="precision=int8 needs a CPU with AVX2 .*leave it at fp32"):
        opened(precision="int8")

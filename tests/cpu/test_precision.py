"""precision=bf16 and int8: the rounded model, and nothing else about it, in every pass."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from mtp_lightning.cpu.packed import Kind, packed_copy
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.fused import fused_passes
from mtp_lightning.decoding.precision import use_precision
from mtp_lightning.experiment import generating
from tests.decoding.models import (
    random_prompts,
    small_model,
    steer_drafts,
    verify_passes_give_the_bits_of_single_ones,
)
from tests.kernels import use_library

NEW = 14


@pytest.fixture(autouse=True)
def own(library, monkeypatch):
    use_library(monkeypatch, library)


KINDS = {"bf16": Kind.HALF, "int8": Kind.BYTE}
ROUNDED = pytest.mark.parametrize("precision", KINDS)


def rounded(precision: str, seed: int, depth: int, **mtp):
    model = small_model(seed, depth, **mtp)
    use_precision(model, precision)
    return model


@ROUNDED
@pytest.mark.parametrize("deepseek", [False, True], ids=["dense", "deepseek"])
def test_drafts_give_the_rounded_models_plain_text(deepseek, precision, monkeypatch):
    model = rounded(precision, 4, 2, deepseek=deepseek)
    prompts = random_prompts(4, (5, 1, 13))
    options = {"max_new_tokens": NEW}
    expected = [g.token_ids for g in generate(model, prompts, speculative=False, **options)]
    right = [p + e for p, e in zip(prompts, expected, strict=True)]
    assert [g.token_ids for g in generate(model, prompts, **options)] == expected
    with monkeypatch.context() as patch:
        steer_drafts(patch, right, chance=0.6, seed=1)
        together = generate(model, prompts, **options)
        assert [g.token_ids for g in together] == expected
        assert any(any(g.accepted_mask) for g in together)
    # The same model by PyTorch's operators in fp32.
    use_library(monkeypatch, None)
    assert [g.token_ids for g in generate(model, prompts, **options)] == expected


@ROUNDED
@pytest.mark.parametrize("deepseek", [False, True], ids=["dense", "deepseek"])
@pytest.mark.parametrize(("threads", "rows"), [(1, 1), (2, 1), (1, 7)])
def test_a_verify_pass_gives_the_bits_of_single_passes(deepseek, threads, rows, precision):
    model = rounded(precision, 3, 2, deepseek=deepseek)
    with fused_passes(model):
        assert packed_copy(model.head.weight).kind == KINDS[precision]
    verify_passes_give_the_bits_of_single_ones(model, threads=threads, rows=rows)


@ROUNDED
def test_what_is_rounded_is_read_in_fewer_bytes_and_the_rest_is_left(precision):
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
        assert packed_copy(model.head.weight).kind == KINDS[precision]
        assert "forward" in vars(model.trunk)


def test_refusals_name_the_remedy(monkeypatch):
    model = small_model(2, 1)
    with pytest.raises(ValueError, match="precision must be .*, not 'int4'|precision=int4"):
        use_precision(model, "int4")
    use_library(monkeypatch, None)
    with pytest.raises(ValueError, match="needs a CPU with AVX-512 .*leave precision=fp32"):
        use_precision(model, "bf16")


def test_generate_takes_it(monkeypatch):
    model = small_model(2, 1)
    run = SimpleNamespace(model=model)
    monkeypatch.setattr(generating, "open_model", lambda *args, **options: run)
    settings = {"num_threads": 1, "accelerator": "cpu", "checkpoint": "x", "allow": []}
    cfg = SimpleNamespace(**settings, precision="bf16", compile=False)
    assert generating.open_for(cfg) is run
    assert torch.equal(model.head.weight, model.head.weight.bfloat16().float())
    monkeypatch.setattr(generating, "open_model", None)  # refused before a model is read
    cfg.compile = True
    with pytest.raises(ValueError, match="precision=bf16 does not go together with compile=true"):
        generating.open_for(cfg)
    cfg.compile, cfg.precision = False, "int4"
    with pytest.raises(ValueError, match="precision=int4 is unknown"):
        generating.open_for(cfg)
    cfg.precision = "int8"
    use_library(monkeypatch, None)
    with pytest.raises(ValueError, match="precision=int8 needs a CPU with AVX-512"):
        generating.open_for(cfg)

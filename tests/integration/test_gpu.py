"""What only a CUDA device can show: the same losses as on a CPU, and drafts that change nothing."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtp_lightning.decoding import generate
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.attention import ForwardContext
from mtp_lightning.nn.experts import fits_grouped
from mtp_lightning.nn.moe import MoE
from mtp_lightning.objective.balance.base import NoBalance
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.opening import open_model
from tests import deepseek
from tests.integration.helpers import rows, train_here
from tests.models import build, windows

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device here", allow_module_level=True)


@pytest.mark.parametrize("mtp", ["sequential", "parallel"])
def test_losses_are_those_of_a_cpu(tmp_path: Path, cache: Path, mtp: str) -> None:
    settings = {"mtp": mtp, "trainer.max_steps": 20, "trainer.precision": "32-true"}
    for accelerator in ("cpu", "cuda"):
        train_here(tmp_path / accelerator, cache, settings | {"trainer.accelerator": accelerator})
    on_cpu, on_gpu = rows(tmp_path / "cpu"), rows(tmp_path / "cuda")
    for a, b in zip(on_cpu, on_gpu, strict=True):
        if "train/loss" in a:
            assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_documents_are_those_of_a_cpu(tmp_path, cache, recompute):
    """Attention in blocks of documents, and the loss as one kernel, in fp32."""
    settings = {
        "trainer.max_steps": 20, "data.document_mask": True, "data.seq_len": 160,
        "model.recompute": recompute, "trainer.precision": "32-true",
    }  # fmt: skip
    for accelerator in ("cpu", "cuda"):
        own = {"trainer.accelerator": accelerator, "trainer.compile": accelerator == "cuda"}
        train_here(tmp_path / accelerator, cache, settings | own)
    on_cpu, on_gpu = rows(tmp_path / "cpu"), rows(tmp_path / "cuda")
    for a, b in zip(on_cpu, on_gpu, strict=True):
        if "train/loss" in a:
            assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("latent", [False, True])
def test_attention_in_blocks_is_that_of_the_dense_mask(tiny_trunk, latent, dtype):
    trunk = replace(tiny_trunk, d_model=128, d_head=32)
    if latent:
        trunk = deepseek.trunk(latent={"d_nope": 20, "d_value": 16}, d_head=None)
    layer = trunk.attention.build(trunk, 0).to("cuda", dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    documents = (torch.arange(300, device="cuda") // 70).expand(2, -1)
    x = torch.randn(2, 300, trunk.d_model, device="cuda", dtype=dtype)
    found = []
    for in_blocks in (False, True):
        ctx = ForwardContext.of_window(
            trunk, 300, device=x.device, dtype=dtype, documents=documents, in_blocks=in_blocks
        )
        own = x.clone().requires_grad_()
        call = torch.compile(layer) if in_blocks else layer
        out = call(own, ctx)
        found.append([out, *torch.autograd.grad(out.square().sum(), [own, *layer.parameters()])])
    bound = 0.05 if dtype == torch.bfloat16 else 5e-3
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < bound


@pytest.mark.parametrize("speculative", [False, True])
def test_recorded_passes_decode_the_same(tmp_path, cache, monkeypatch, speculative):
    """Compiled, and played as CUDA graphs."""
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path / "programs"))
    train_here(tmp_path, cache, {"trainer.accelerator": "cuda", "trainer.max_steps": 30})
    model = open_model(tmp_path, device="cuda").model
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    eager, recorded = (
        generate(
            model, prompts, max_new_tokens=40, speculative=speculative, compile=compile,
            batch_size=1,
        )
        for compile in (False, True)
    )  # fmt: skip
    assert [g.token_ids for g in recorded] == [g.token_ids for g in eager]


def test_greedy_drafts_change_nothing(tmp_path: Path, cache: Path) -> None:
    train_here(tmp_path, cache, {"trainer.accelerator": "cuda", "trainer.max_steps": 30})
    model = open_model(tmp_path, device="cuda").model
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    drafted, plain = (
        generate(model, prompts, max_new_tokens=40, speculative=speculative)
        for speculative in (True, False)
    )
    assert [g.token_ids for g in drafted] == [g.token_ids for g in plain]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize("case", ["sequential", "parallel", "experts"])
def test_a_step_does_not_wait_for_the_device(tiny_trunk, case, documents, compiled):
    """tests/objective/test_waits.py finds on a CPU what CUDA itself refuses here."""
    if case == "experts":
        model = deepseek.build(deepseek.TRUNK, depth=2).to("cuda", torch.bfloat16).train()
    else:
        trunk = replace(tiny_trunk, d_head=16)
        model = build(trunk, MTPConfig.find(case)(depth=2)).to("cuda").train()
    if compiled:
        model.compile_blocks()
    batch = windows(4, 12, 2)
    if documents:
        ids = (torch.arange(batch.tokens.shape[1]) // 5).expand(batch.tokens.shape)
        batch = replace(batch, documents=ids)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = OptimizerStep(
        model, schedule=Piecewise(2, 0.3), balance=NoBalance(2), accumulate=2, clip_norm=1.0
    )
    moved, progress = (
        batch.pin_memory().to("cuda", non_blocking=True),
        Progress(step=0, max_steps=10),
    )
    step(moved, progress, optimizer)  # kernels are loaded, and the optimizer's state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(moved, progress, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_grouped_experts_are_the_formula() -> None:
    """In bfloat16 on a GPU one grouped product takes all experts."""
    model = deepseek.build(deepseek.TRUNK)
    layer = next(m for m in model.modules() if isinstance(m, MoE)).bfloat16().cuda()
    x = torch.randn(2, 16, deepseek.TRUNK.d_model, dtype=torch.bfloat16, device="cuda")
    assert fits_grouped(x.flatten(0, 1), layer.experts.down)
    expected = copy.deepcopy(layer).double().cpu()(x.double().cpu())
    torch.testing.assert_close(layer(x).double().cpu(), expected, rtol=0.05, atol=0.05)


def test_defaults_of_a_gpu(tmp_path: Path, cache: Path) -> None:
    settings = {"trainer.accelerator": "auto", "trainer.max_steps": 6}
    train_here(tmp_path, cache, settings)
    trainer = open_model(tmp_path, device="cuda").config["trainer"]
    assert trainer["accelerator"] == "cuda" and trainer["precision"] == "bf16-mixed"
    losses = [row["train/loss"] for row in rows(tmp_path) if "train/loss" in row]
    assert losses and all(math.isfinite(loss) for loss in losses)

"""On a CUDA device: the losses of a CPU, lossless drafts, and steps that do not wait."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.decoding import generate
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.experts import fits_grouped
from mtp_lightning.nn.moe import MoE
from mtp_lightning.objective.balance.base import NoBalance
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.opening import open_model
from tests import deepseek
from tests.integration.helpers import column, train_here
from tests.models import build, windows

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device here", allow_module_level=True)


def assert_losses_of_a_cpu(
    folder: Path, cache: Path, settings: dict[str, Any], on_gpu: dict[str, Any], *, rel: float
) -> None:
    """Train 20 steps in fp32 on both devices, with ``on_gpu`` on the GPU; compare the losses."""
    common = settings | {"trainer.max_steps": 20, "trainer.precision": "32-true"}
    losses = []
    for more in ({"trainer.accelerator": "cpu"}, {"trainer.accelerator": "cuda"} | on_gpu):
        run = folder / str(more["trainer.accelerator"])
        train_here(run, cache, common | more)
        losses.append(column(run, "train/loss"))
    assert losses[1] == pytest.approx(losses[0], rel=rel) and len(losses[0]) == 20


@pytest.mark.parametrize("mtp", ["sequential", "parallel"])
def test_losses_equal_those_of_a_cpu(tmp_path: Path, cache: Path, mtp: str) -> None:
    assert_losses_of_a_cpu(tmp_path, cache, {"mtp": mtp}, {}, rel=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_losses_with_document_masks_equal_those_of_a_cpu(tmp_path, cache, recompute):
    """With block attention, and the loss in one kernel."""
    settings = {"data.document_mask": True, "data.seq_len": 160, "model.recompute": recompute}
    assert_losses_of_a_cpu(tmp_path, cache, settings, {"trainer.compile": True}, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("latent", [False, True])
def test_block_attention_equals_attention_with_a_dense_mask(tiny_trunk, latent, dtype):
    trunk = replace(tiny_trunk, d_model=128, d_head=32)
    if latent:
        trunk = deepseek.trunk(latent={"d_nope": 20, "d_value": 16}, d_head=None)
    layer = trunk.attention.build(trunk, 0).to("cuda", dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    documents = (torch.arange(300, device="cuda") // 70).expand(2, -1)
    x = torch.randn(2, 300, trunk.d_model, device="cuda", dtype=dtype)
    outputs = []
    for in_blocks in (False, True):
        ctx = ForwardContext.of_window(
            trunk, 300, device=x.device, dtype=dtype, documents=documents, in_blocks=in_blocks
        )
        inputs = x.clone().requires_grad_()
        call = torch.compile(layer) if in_blocks else layer
        out = call(inputs, ctx)
        gradients = torch.autograd.grad(out.square().sum(), [inputs, *layer.parameters()])
        outputs.append([out, *gradients])
    bound = 0.05 if dtype == torch.bfloat16 else 5e-3
    for a, b in zip(*outputs, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < bound


def trained_model(folder: Path, cache: Path) -> MTPModel:
    train_here(folder, cache, {"trainer.accelerator": "cuda", "trainer.max_steps": 30})
    torch.set_float32_matmul_precision("highest")  # as in generate.py
    return open_model(folder, device="cuda").model


def tokens(model: MTPModel, **options: Any) -> list[list[int]]:
    generations = generate(model, [[1, 2, 3], [4, 5, 6, 7]], max_new_tokens=40, **options)
    return [generation.token_ids for generation in generations]


@pytest.mark.parametrize("speculative", [False, True])
def test_cuda_graphs_decode_the_same_tokens(tmp_path, cache, monkeypatch, speculative):
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path / "programs"))
    model = trained_model(tmp_path, cache)
    eager, graphs = (
        tokens(model, speculative=speculative, compile=compiled, batch_size=1)
        for compiled in (False, True)
    )
    assert graphs == eager


def test_greedy_drafts_are_lossless_on_a_gpu(tmp_path: Path, cache: Path) -> None:
    model = trained_model(tmp_path, cache)
    assert tokens(model, speculative=True) == tokens(model, speculative=False)


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
    moved = batch.pin_memory().to("cuda", non_blocking=True)
    progress = Progress(step=0, max_steps=10)
    step(moved, progress, optimizer)  # kernels are loaded, and the optimizer's state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(moved, progress, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_grouped_experts_equal_the_formula_in_float64() -> None:
    """In bfloat16 on a GPU one grouped product takes all experts."""
    model = deepseek.build(deepseek.TRUNK)
    layer = next(m for m in model.modules() if isinstance(m, MoE)).bfloat16().cuda()
    x = torch.randn(2, 16, deepseek.TRUNK.d_model, dtype=torch.bfloat16, device="cuda")
    assert fits_grouped(x.flatten(0, 1), layer.experts.down)
    expected = copy.deepcopy(layer).double().cpu()(x.double().cpu())
    torch.testing.assert_close(layer(x).double().cpu(), expected, rtol=0.05, atol=0.05)


def test_auto_trains_on_the_gpu_in_bf16(tmp_path: Path, cache: Path) -> None:
    settings = {"trainer.accelerator": "auto", "trainer.max_steps": 6}
    train_here(tmp_path, cache, settings)
    trainer = open_model(tmp_path, device="cuda").run_config["trainer"]
    assert trainer["accelerator"] == "cuda" and trainer["precision"] == "bf16-mixed"
    losses = column(tmp_path, "train/loss").values()
    assert losses and all(math.isfinite(loss) for loss in losses)

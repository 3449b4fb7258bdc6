"""Every kind of trunk under bf16 autocast, against the same step in fp32."""

from __future__ import annotations

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel
from tests import deepseek
from tests.interop import folders


def gradients(model: MTPModel, batch: WindowBatch, *, autocast: bool) -> torch.Tensor:
    """Of every parameter, in one vector."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states = model(batch)
    sum(h.float().square().mean() for h in states.values()).backward()  # type: ignore[union-attr]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # PyTorch's, of a norm of bf16
@pytest.mark.parametrize("name", folders.TRUNKS)
def test_a_step_is_that_of_fp32_but_for_roundings(name: str) -> None:
    model = deepseek.build(folders.TRUNKS[name], depth=1).train()
    if name.startswith("qwen2"):
        for block in model.trunk.blocks:
            torch.nn.init.normal_(block.attention.qkv_bias, std=0.2)
    generator = torch.Generator().manual_seed(0)
    batch = WindowBatch(torch.randint(folders.ROWS, (2, 42), generator=generator), 1)
    found, wanted = (gradients(model, batch, autocast=way) for way in (True, False))
    # A rounding may send a token to another expert: the whole is compared.
    assert found.isfinite().all() and torch.cosine_similarity(found, wanted, dim=0) > 0.98

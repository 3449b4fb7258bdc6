"""Every kind of trunk under bf16 autocast, against the same step in fp32."""

from __future__ import annotations

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.ops import attention, linear
from tests import deepseek, losses
from tests.interop import folders
from tests.kernels import HAS_CPU

# Without the part for CPUs autocast gives norms bf16 rows and fp32 gains, of which PyTorch warns.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype")


def gradients(model: MTPModel, batch: WindowBatch, *, autocast: bool) -> dict[str, torch.Tensor]:
    """The gradients by parameter. As in a run, the backward pass is also under autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states = model(batch)
        loss = sum(h.float().square().mean() for h in states.values())
        loss.backward()  # type: ignore[union-attr]
    return losses.gradients(model)


@pytest.mark.parametrize(
    "name", ["llama-tied", "qwen2", "qwen3_moe", "glm4_moe", "deepseek", "deepseek-yarn"]
)
def test_a_step_under_autocast_has_about_the_gradients_of_fp32(name: str) -> None:
    model = deepseek.build(folders.TRUNKS[name], depth=1).train()
    if name.startswith("qwen2"):
        for block in model.trunk.blocks:
            torch.nn.init.normal_(block.attention.qkv_bias, std=0.2)
    generator = torch.Generator().manual_seed(0)
    batch = WindowBatch(torch.randint(folders.ROWS, (2, 42), generator=generator), 1)
    low, full = (gradients(model, batch, autocast=autocast) for autocast in (True, False))
    assert low.keys() == full.keys()
    for parameter, gradient in full.items():
        # Rounding may send a token to another expert.
        similarity = torch.cosine_similarity(low[parameter].flatten(), gradient.flatten(), dim=0)
        assert similarity > 0.95 or not gradient.any(), parameter


@pytest.mark.skipif(not HAS_CPU, reason="autocast alone gives results in bf16")
def test_a_linear_layer_rounds_only_its_operands_and_results() -> None:
    x, w, seed = torch.randn(3, 40, 24), torch.randn(56, 24), torch.randn(3, 40, 56)
    x, w = x.requires_grad_(), w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, w)
        y.backward(seed)
    assert y.dtype == x.grad.dtype == w.grad.dtype == torch.float32  # type: ignore[union-attr]
    x_64, w_64, seed_64 = (t.detach().bfloat16().double() for t in (x, w, seed))
    rounded = {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(y.double(), x_64 @ w_64.T, **rounded)
    torch.testing.assert_close(x.grad.double(), seed_64 @ w_64, **rounded)
    d_w = torch.einsum("btn,btk->nk", seed_64, x_64)
    torch.testing.assert_close(w.grad.double(), d_w, **rounded)
    assert torch.equal(y, y.bfloat16().float())


@pytest.mark.skipif(not HAS_CPU, reason="autocast alone attends in bf16")
@pytest.mark.parametrize("sizes", [(12, 8), (16, 32), (24, 24)])
def test_short_windows_attend_in_fp32(sizes: tuple[int, int]) -> None:
    query, key, value = (torch.randn(2, 9, 4, h) for h in (sizes[0], *sizes))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(query, key, value, None)
    expected = attention.plain(*(x.double() for x in (query, key, value)), None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_linear_layer_of_other_dtypes_is_left_to_autocast() -> None:
    x, w = torch.randn(4, 8).double(), torch.randn(8, 8).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, w), x @ w.T)
        assert linear(x.bfloat16(), w.float()).dtype == torch.bfloat16

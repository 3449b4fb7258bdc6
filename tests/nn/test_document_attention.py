"""Attention within documents: the mask in blocks against the dense mask, in float64.

On a CPU, FlexAttention runs its formula instead of a kernel, and refuses gradients; ``on_cpu``
removes this refusal. tests/integration/test_gpu.py tests the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.document_attention import block_mask, dense_mask, to_dense
from tests import deepseek
from tests.models import build, windows

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo's own
LATENT = deepseek.trunk(latent={"d_nope": 20, "d_value": 16}, d_head=None)
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 160 + [2] * 31, [3] * 200])


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *heads: None)
    monkeypatch.setattr(flex_attention, "_warn_once", lambda *args, **kwargs: None)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3), st.integers(1, 300), st.integers(0, 60), st.integers(0, 10))
def test_a_mask_in_blocks_is_the_dense_mask(
    rows: int, seq_len: int, per_text: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    documents = torch.rand(rows, seq_len, generator=generator).mul(per_text + 1).long()
    documents = (documents == 0).cumsum(1)
    mask = to_dense(block_mask(documents))
    assert torch.equal(mask, dense_mask(documents))
    for row, ids in enumerate(documents.tolist()):
        for q in {0, seq_len // 2, seq_len - 1}:
            expected = [ids[k] == ids[q] and k <= q for k in range(seq_len)]
            assert mask[row, 0, q].tolist() == expected


def gradients(model: nn.Module, x: Tensor, ctx: ForwardContext) -> list[Tensor]:
    """The output of an attention layer, and the gradients of its input and parameters."""
    x = x.clone().requires_grad_()
    out = model(x, ctx)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("kind", ["grouped", "qk_norm", "latent"])
def test_a_layer_computes_the_same_with_both_masks(tiny_trunk: TrunkConfig, kind: str) -> None:
    if kind == "latent":
        trunk = LATENT
    else:
        attention = GroupedQueryConfig(qk_norm=kind == "qk_norm")
        trunk = replace(tiny_trunk, attention=attention, d_head=16)
    layer = trunk.attention.build(trunk, 0).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.5, 0.2)
    x = torch.randn(*DOCUMENTS.shape, trunk.d_model, dtype=torch.float64)
    dense, blocks = (
        ForwardContext.of_window(
            trunk, x.shape[1], device=x.device, dtype=x.dtype, documents=DOCUMENTS, in_blocks=way
        )
        for way in (False, True)
    )
    for a, b in zip(gradients(layer, x, blocks), gradients(layer, x, dense), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-8)


@dataclass(frozen=True, kw_only=True)
class UsersAttention(GroupedQueryConfig, variant="users_attention"):
    """A user's attention, which may use the mask as a tensor."""


def test_only_layers_that_support_blocks_get_them(tiny_trunk: TrunkConfig) -> None:
    wide = replace(tiny_trunk, d_head=16)
    for trunk, expected in (
        (wide, BlockMask),
        (tiny_trunk, Tensor),  # kernels need heads of at least 16
        (LATENT, BlockMask),
        (deepseek.trunk(latent={"d_nope": 20, "d_value": 12}, d_head=None), Tensor),
        (replace(wide, attention=UsersAttention()), Tensor),
    ):
        mask = ForwardContext.of_window(
            trunk, 200, device=DOCUMENTS.device, documents=DOCUMENTS, in_blocks=True
        ).mask
        assert isinstance(mask, expected)


def masked_windows(length: int) -> WindowBatch:
    """Windows with documents of ``length`` tokens, which begin elsewhere in each row."""
    batch = windows(2, 150, 1)
    places = torch.arange(batch.tokens.shape[1])
    documents = torch.stack((places // length, (places + 20) // length))
    return WindowBatch(batch.tokens, batch.depth, documents)


def states(model: MTPModel, batch: WindowBatch) -> list[Tensor]:
    """Hidden states of all depths, and the gradients of all parameters."""
    hidden = list(model(batch).values())
    loss = torch.stack([h.square().sum() for h in hidden]).sum()
    return [*hidden, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "recompute",
    [pytest.param(False, marks=pytest.mark.long), pytest.param(True, marks=pytest.mark.slow)],
)
def test_compiled_blocks_are_traced_once_for_all_masks(
    tiny_trunk: TrunkConfig, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch has other documents, and nothing is compiled again."""
    trunk = replace(tiny_trunk, recompute=recompute, d_head=16)
    model = build(trunk, "sequential", depth=1).double().train()
    batches = [masked_windows(length) for length in (40, 11)]
    expected = [states(model, batch) for batch in batches]
    assert not model.compiled
    for block in (layer for layer in model.modules() if isinstance(layer, Block)):
        block.compile(backend="aot_eager")
    make = ForwardContext.of_window
    monkeypatch.setattr(
        ForwardContext,
        "of_window",
        lambda *args, **kwargs: make(*args, **kwargs | {"in_blocks": True}),
    )
    torch.compiler.reset()
    first = states(model, batches[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        second = states(model, batches[1])
    for a, b in zip([*first, *second], [*expected[0], *expected[1]], strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_registers_have_the_same_mask_from_blocks(tiny_trunk: TrunkConfig) -> None:
    stack = build(replace(tiny_trunk, d_head=16), "registers", lookahead=3).mtp
    masks = [
        stack.context(
            ForwardContext.of_window(
                stack.trunk_config, 200, device=torch.device("cpu"), documents=DOCUMENTS,
                in_blocks=way,
            ),
            200,
            2,
        ).mask
        for way in (False, True)
    ]  # fmt: skip
    assert torch.equal(*masks)

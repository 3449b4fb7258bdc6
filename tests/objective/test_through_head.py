"""The loss that computes the head chunk by chunk, against float64 logits, and its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.mtp.feed import LossRequest, ThroughHead, Together
from mtp_lightning.nn import ops as kernel
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective import through_head
from mtp_lightning.objective.micro_batch import feed_loss
from mtp_lightning.objective.targets import DepthTarget
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.js import JS
from mtp_lightning.objective.terms.kl import KL
from mtp_lightning.objective.terms.lk import LK
from mtp_lightning.objective.terms.mixture import Mixture
from tests.losses import mtp_loss
from tests.models import build, windows
from tests.objective.memory import LiveMemory

Depths = list[tuple[Tensor, DepthTarget]]


def target(depth: int, tokens: Tensor, coefficient: float) -> DepthTarget:
    return DepthTarget(depth, tokens, coefficient, CrossEntropy())


def chunked_loss(
    weight: Tensor, depths: Depths, *, train_head: bool = True, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    states, targets = zip(*depths, strict=True)
    feed = Together(states[0], list(enumerate(states))[1:], {})
    return feed_loss(weight, feed, targets, train_head=train_head, compiled=compiled)


def expected(
    weight: Tensor, depths: Depths, *, train_head: bool = True
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Total, sums and gradients from all logits at once, in float64."""
    w = weight.detach().double().requires_grad_()
    hidden = [h.detach().double().requires_grad_() for h, _ in depths]
    total = torch.zeros((), dtype=torch.float64)
    sums = []
    for (_, depth), h in zip(depths, hidden, strict=True):
        logits = h @ (w if train_head or depth.depth == 0 else w.detach()).T
        nll = F.cross_entropy(
            logits.flatten(0, -2), depth.tokens.flatten(), ignore_index=-100, reduction="sum"
        )
        sums.append(nll)
        total = total + depth.coefficient * nll
    grads = torch.autograd.grad(total, [w, *hidden], allow_unused=True)
    return total, sums, grads[0], list(grads[1:])


@pytest.mark.parametrize(("train_head", "one_kernel"), [(True, False), (True, True), (False, True)])
def test_values_and_gradients_equal_those_of_whole_logits(
    train_head: bool, one_kernel: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(17, 16, generator=generator, requires_grad=True)
    depths = []
    for k in range(4):
        targets = torch.randint(0, 17, (2, 40), generator=generator)
        targets[torch.rand(targets.shape, generator=generator) < 0.5] = -100
        hidden = torch.randn(2, 40, 16, generator=generator).requires_grad_()
        depths.append((hidden, target(k, targets, 0.1 * (k + 1))))
    with mock.patch.object(kernel, "_compiled_cross_entropy", lambda: kernel._cross_entropy):
        total, sums = chunked_loss(weight, depths, train_head=train_head, compiled=one_kernel)
    exact = expected(weight, depths, train_head=train_head)
    exact_total, exact_sums, d_weight, d_hidden = exact
    torch.testing.assert_close(total.double(), exact_total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums, torch.stack(exact_sums).detach(), rtol=1e-5, atol=1e-4)
    (3.0 * total).backward()
    torch.testing.assert_close(weight.grad.double(), 3 * d_weight, rtol=1e-4, atol=1e-4)
    for (hidden, _), gradient in zip(depths, d_hidden, strict=True):
        torch.testing.assert_close(hidden.grad.double(), 3 * gradient, rtol=1e-4, atol=1e-4)


class DeepestFirst(Together):
    def input_gradients(
        self, request: LossRequest, through_head: ThroughHead
    ) -> Sequence[Tensor | None]:
        return super().input_gradients(request, lambda predictions: through_head(predictions[::-1]))


def test_a_feed_may_send_its_depths_in_any_order() -> None:
    weight = torch.randn(50, 8, requires_grad=True)
    states = [torch.randn(2, 9, 8) for _ in range(3)]
    targets = [target(k, torch.randint(0, 50, (2, 9)), 0.1 * (k + 1)) for k in range(3)]
    results = []
    for kind in (Together, DeepestFirst):
        inputs = [h.clone().requires_grad_() for h in states]
        feed = kind(inputs[0], list(enumerate(inputs))[1:], {})
        total, sums = feed_loss(weight, feed, targets)
        results.append((total, sums, *torch.autograd.grad(total, [weight, *inputs])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_no_tensor_is_larger_than_one_chunk_of_logits() -> None:
    vocab, rows = 20_000, 700
    weight = torch.randn(vocab, 8, requires_grad=True)
    depths = [
        (torch.randn(rows, 8, requires_grad=True), target(k, torch.zeros(rows).long(), 1.0))
        for k in range(3)
    ]
    with LiveMemory(least=vocab) as memory:
        chunked_loss(weight, depths)[0].backward()
    chunk = through_head.chunk_rows(vocab, torch.device("cpu")) * vocab
    assert vocab * 8 < memory.largest <= chunk < rows * vocab


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_equals_float64(dtype: torch.dtype) -> None:
    """With chunks of two lengths, as on a GPU."""
    weight = torch.randn(300, 16).to(dtype).requires_grad_()
    tokens = torch.randint(0, 300, (2, 400))
    tokens[:, ::3] = -100
    hidden = torch.randn(2, 400, 16).to(dtype).requires_grad_()
    depths = [(hidden, target(0, tokens, 0.7))]
    with mock.patch.dict(through_head._CHUNK_NUMEL, cpu=300 * 256):
        total, sums = chunked_loss(weight, depths, compiled=True)
    total.backward()
    exact_total, exact_sums, d_weight, (d_hidden,) = expected(weight, depths)
    bound = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(total.double(), exact_total, rtol=bound, atol=bound)
    torch.testing.assert_close(sums, torch.stack(exact_sums).detach(), rtol=bound, atol=bound)
    for gradient, exact in ((weight.grad, d_weight), (hidden.grad, d_hidden)):
        assert float((gradient.double() - exact).abs().max() / exact.abs().max()) < bound


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "term"),
    [
        ("sequential", JS()),
        ("parallel", KL(temperature=2)),
        ("parameter_free", LK()),
        ("parallel", Mixture({"ce": 1, "kl": 1, "tv": 1, "feature": 1})),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_terms_with_a_teacher_hold_a_few_chunks_of_logits(
    tiny_trunk: TrunkConfig, variant: str, term: Term, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward and the backward pass, for any number of depths and positions."""
    rows, vocab = 16, 20_000
    monkeypatch.setattr(through_head, "chunk_rows", lambda *_: rows)
    trunk = replace(tiny_trunk, vocab_size=vocab)
    peaks = []
    for depth in (1, 4):
        model = build(trunk, variant, depth=depth)
        batch = windows(8, 64, depth)
        with LiveMemory(least=rows * vocab // 2) as memory:
            total, _ = mtp_loss(model, batch, [0.1] * depth, [512] * (depth + 1), term=term)
            total.backward()
        head = vocab * trunk.d_model  # a gradient of the weight may be larger than a chunk
        assert memory.largest <= max(rows * vocab, head) < 512 * vocab
        peaks.append(memory.peak)
    assert peaks[1] <= peaks[0] + 4 * rows * vocab
    # Two tensors have the size of the head: its gradient, and that of one chunk.
    assert peaks[1] <= 4 * (7 * rows * vocab + 2 * head) < 4 * 512 * vocab

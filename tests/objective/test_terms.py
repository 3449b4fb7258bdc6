"""Terms of the objective: value and gradient, alone and through every kind of stack."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.terms.base import Chunk, Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from tests.losses import mtp_loss
from tests.models import build, windows


class Traced(CrossEntropy):
    """Cross-entropy whose gradient autograd makes."""

    gradient = Term.gradient


@dataclass
class Focal(Term):
    """``-(1 - q)^gamma log q``, of which nothing but the value is written down."""

    name = "focal"
    gamma: float = 2.0

    def value(self, chunk: Chunk) -> Tensor:
        log_q_R = chunk.log_probs_RV.gather(1, chunk.targets_R.unsqueeze(-1)).squeeze(-1)
        return -((1 - log_q_R.exp()) ** self.gamma) * log_q_R


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), rows=st.integers(1, 9), vocab=st.integers(2, 30))
def test_the_traced_gradient_is_the_closed_one(seed: int, rows: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, vocab, (rows,), generator=generator)
    found = [
        term.gradient(Chunk(1, torch.log_softmax(logits, -1), tokens))
        for term in (Traced(), CrossEntropy())
    ]
    leaf = logits.clone().requires_grad_()
    loss = F.cross_entropy(leaf, tokens, reduction="none")
    loss.sum().backward()
    for value, gradient in found:
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", ["sequential", "parallel", "linear", "parameter_free"])
def test_a_term_trains_the_depths_of_every_stack(
    tiny_trunk: TrunkConfig, variant: str, masked: bool
) -> None:
    """Against autograd on whole fp64 logits (a chunk's log-probabilities are fp32); the main
    prediction keeps cross-entropy."""
    model = build(tiny_trunk, MTPConfig.find(variant)(depth=2)).double()
    batch = windows(2, 9, 2)
    if masked:
        documents = (torch.arange(12) // 5).expand(2, -1)
        batch = WindowBatch(batch.tokens, 2, documents)
    counts, weights = batch.counts().tolist(), [0.5, 0.25]
    total, sums = mtp_loss(model, batch, weights, counts, term=Focal(1.5))
    total.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    expected = torch.zeros((), dtype=torch.float64)
    for k, hidden in model(batch).items():
        log_q = torch.log_softmax(model.head(hidden), -1)
        target = batch.targets(k)
        valid = target >= 0
        log_q = log_q.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        value = -log_q if k == 0 else -((1 - log_q.exp()) ** 1.5) * log_q
        assert sums[k].item() == pytest.approx(value[valid].sum().item(), rel=1e-6)
        expected = expected + [1.0, *weights][k] * value[valid].sum() / counts[k]
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_cross_entropy_by_autograd_is_cross_entropy(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, MTPConfig.find("parameter_free")(depth=2)).double()
    batch = windows(2, 9, 2)
    losses = []
    for term in (None, Traced(), CrossEntropy()):
        total, _ = mtp_loss(model, batch, [0.5, 0.25], [18] * 3, term=term)
        losses.append(total.item())
    assert losses[0] == losses[2] == pytest.approx(losses[1], rel=1e-12)

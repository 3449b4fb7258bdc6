"""Terms of the objective: values and gradients, alone and with several kinds of stack."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.chunk import Chunk, Teacher
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.e2e_tv import E2ETV
from mtp_lightning.objective.terms.eal import EAL
from mtp_lightning.objective.terms.js import JS
from mtp_lightning.objective.terms.kl import KL
from mtp_lightning.objective.terms.lk import LK
from mtp_lightning.objective.terms.mixture import Mixture, known_terms
from mtp_lightning.objective.terms.nla import NLA
from mtp_lightning.objective.terms.reverse_kl import ReverseKL
from mtp_lightning.objective.terms.tv import TV
from mtp_lightning.objective.terms.wtv import WTV
from tests.losses import mtp_loss
from tests.models import build, windows
from tests.objective.whole import ACCEPTED, FORMULAS, At


@dataclass
class Focal(Term):
    """``-(1 - q)^gamma log q``, with the gradient of autograd."""

    name = "focal"
    gamma: float = 2.0

    def value(self, chunk: Chunk) -> Tensor:
        log_q_R = chunk.log_probs_RV.gather(1, chunk.targets_R.unsqueeze(-1)).squeeze(-1)
        return -((1 - log_q_R.exp()) ** self.gamma) * log_q_R


DISTANCES: dict[str, Term] = {
    "kl": KL(),
    "kl at temperature 2": KL(temperature=2),
    "reverse_kl": ReverseKL(),
    "js": JS(),
    "tv": TV(),
    "nla": NLA(),
    "lk": LK(),
    "e2e_tv": E2ETV(),
    "wtv at temperature 0.6": WTV(0.6),
}
# These are 0 only if both distributions have all mass on one token.
GREEDY: dict[str, Term] = {"eal": EAL(), "ce": CrossEntropy()}


def chunk_of(logits_q: Tensor, logits_p: Tensor, tokens: Tensor) -> Chunk:
    main = Teacher(torch.log_softmax(logits_p, -1), torch.empty(0))
    return Chunk(1, torch.log_softmax(logits_q, -1), tokens, None, main)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 5),
    vocab=st.integers(2, 12),
    sharp=st.sampled_from([0.3, 1.0, 6.0]),
)
@pytest.mark.parametrize("name", DISTANCES | GREEDY)
def test_a_terms_value_and_gradient_equal_its_formula(
    name: str, seed: int, rows: int, vocab: int, sharp: float
) -> None:
    """The gradient in closed form and that of autograd, against the definition."""
    generator = torch.Generator().manual_seed(seed)
    logits_q, logits_p = sharp * torch.randn(
        2, rows, vocab, generator=generator, dtype=torch.float64
    )
    tokens = torch.randint(0, vocab, (rows,), generator=generator)
    leaf = logits_q.clone().requires_grad_()
    log_q, log_p = torch.log_softmax(leaf, -1), torch.log_softmax(logits_p, -1)
    none = torch.empty(0)
    at = At(log_q, log_p, tokens, none, none)
    expected = 1 - ACCEPTED[name](at) if name in ACCEPTED else FORMULAS[name](at)
    expected.sum().backward()
    term = (DISTANCES | GREEDY)[name]
    for gradient in (term.gradient, lambda chunk: Term.gradient(term, chunk)):
        chunk = chunk_of(logits_q, logits_p, tokens)
        value, d_logits = gradient(chunk)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(d_logits, leaf.grad, rtol=1e-9, atol=1e-12)
        # The teacher is not overwritten, since the next depth reads it.
        assert torch.equal(chunk.teacher.log_probs_RV, log_p)
        assert torch.equal(chunk.teacher.probs_RV, log_p.exp())
    assert torch.equal(term.value(chunk_of(logits_q, logits_p, tokens)), value)
    assert value.min() > -1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_and_their_gradients_are_0_between_equal_distributions(
    dtype: torch.dtype,
) -> None:
    logits = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for term in DISTANCES.values():
        for result in term.gradient(chunk_of(logits, logits, torch.zeros(6).long())):
            assert result.abs().max() < 10 * torch.finfo(dtype).eps, term.name


def test_nla_has_no_gradient_below_its_floor() -> None:
    far = torch.tensor([[20.0, 0.0]], dtype=torch.float64)
    value, gradient = NLA().gradient(chunk_of(far, -far, torch.tensor([1])))
    assert value.item() == pytest.approx(-math.log(1e-5)) and not gradient.any()


def test_a_mixture_takes_a_users_term(tiny_trunk: TrunkConfig) -> None:
    mixture = Mixture({"ce": 0.5, "focal": {"weight": 2, "term": Focal(1.5)}})
    assert [(w, term.name) for w, term in mixture.parts()] == [(0.5, "ce"), (2.0, "focal")]
    assert "focal" in known_terms() and "mix" not in known_terms()
    model = build(tiny_trunk, "sequential", depth=1).double()
    batch = windows(2, 9, 1)
    alone = [
        mtp_loss(model, batch, [1.0], [18] * 2, main=0.0, term=term)[0].item()
        for term in (CrossEntropy(), Focal(1.5))
    ]
    both, _ = mtp_loss(model, batch, [1.0], [18] * 2, main=0.0, term=mixture)
    assert both.item() == pytest.approx(0.5 * alone[0] + 2 * alone[1], rel=1e-6)


class Weighted(E2ETV):
    """A coupled term that reads a part of the model."""

    name = "weighted"
    selectable = False
    weight: Tensor | None = None

    def for_model(self, model: MTPModel) -> Term:
        bound = copy(self)
        bound.weight = model.head.weight
        return bound

    def accepted(self, chunk: Chunk) -> Tensor:
        assert self.weight is not None
        return super().accepted(chunk)


def test_the_rules_of_a_term_that_reads_the_model_are_those_of_its_copy(tiny_trunk) -> None:
    model, batch = build(tiny_trunk, "sequential", depth=2), windows(2, 9, 2)
    sums = [
        mtp_loss(model, batch, [1.0, 1.0], [18] * 3, term=term)[1] for term in (E2ETV(), Weighted())
    ]
    assert torch.equal(*sums) and sums[0][2] > 0

"""Terms of the objective: values and gradients, alone and with several kinds of stack."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_lightning.mtp.chunk import Chunk, Teacher
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.terms.anchor import Anchor
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.e2e_tv import E2ETV
from mtp_lightning.objective.terms.eal import EAL
from mtp_lightning.objective.terms.feature import Feature
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


def test_the_expected_accepted_length_equals_that_computed_by_hand() -> None:
    """arXiv 2609.24150, with V = 3 and D = 2. Among equals, the greedy token is the lowest id."""
    p = torch.tensor([[0.2, 0.4, 0.4], [0.6, 0.3, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.3, 0.5, 0.2], [0.25, 0.5, 0.25]], dtype=torch.float64)
    zeros = torch.zeros(1).long()
    term = EAL()
    accepted = [
        term.accepted(chunk_of(q[i : i + 1].log(), p[i : i + 1].log(), zeros)) for i in range(2)
    ]
    assert [a.item() for a in accepted] == pytest.approx([0.5, 0.25])
    valid = dict.fromkeys((1, 2), torch.ones(1, 1).bool())
    ones = dict.fromkeys((1, 2), torch.ones(1, 1, dtype=torch.float64))
    values, scales = term.together(
        {k: a.view(1, 1) for k, a in enumerate(accepted, start=1)}, valid, ones
    )
    # 0.5 + 0.5 * 0.25 drafts are accepted; their derivatives by each chance are 1 + 0.25 and 0.5.
    assert 2 - sum(value.item() for value in values.values()) == pytest.approx(0.625)
    assert [scale.item() for scale in scales.values()] == pytest.approx([1.25, 0.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_and_their_gradients_are_0_between_equal_distributions(
    dtype: torch.dtype,
) -> None:
    logits = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for term in DISTANCES.values():
        for result in term.gradient(chunk_of(logits, logits, torch.zeros(6).long())):
            assert result.abs().max() < 10 * torch.finfo(dtype).eps, term.name


def test_distances_to_a_teacher_that_is_certain_equal_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 20, (6,), generator=generator)
    certain = 1e3 * F.one_hot(tokens, 20).double()
    cross_entropy, expected = CrossEntropy().gradient(chunk_of(logits, certain, tokens))
    for term in (NLA(), KL()):
        value, gradient = term.gradient(chunk_of(logits, certain, tokens))
        torch.testing.assert_close(value, cross_entropy)
        torch.testing.assert_close(gradient, expected)
    # TV is the probability of the other tokens; NLA has no gradient below its floor.
    value, _ = TV().gradient(chunk_of(logits, certain, tokens))
    torch.testing.assert_close(value, 1 - (-cross_entropy).exp())
    far = torch.zeros(1, 2, dtype=torch.float64)
    far[0, 0] = 20.0
    value, gradient = NLA().gradient(chunk_of(far, -far, torch.tensor([1])))
    assert value.item() == pytest.approx(-math.log(1e-5)) and not gradient.any()


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: KL(temperature=0), "objective.temperature must be a number above 0, not 0"),
        (lambda: KL(temperature=-1), "temperature must be a number above 0"),
        (lambda: KL(beta=0), r"objective.beta \(0 is objective=ce\) must be a number in \(0, 1\]"),
        (lambda: WTV(0), "greedy decoding is objective=eal.* must be a number above 0, not 0"),
        (lambda: LK(rate=-1), "objective.rate must be a number of at least 0"),
        (lambda: Feature(normalise=2), "feature.normalise must be true or false"),
        (lambda: Mixture({}), "objective.terms names no term"),
        (lambda: Mixture({"cee": 1}), "has cee, which is unknown: choose among .*ce"),
        (
            lambda: Mixture({"ce": 0}),
            "the weight of ce in objective.terms must be a number above 0",
        ),
        (lambda: Mixture({"kl": {"temperature": 2}}), "the weight of kl .* not None"),
        (lambda: Mixture({"kl": {"weight": 1, "heat": 2}}), "terms.kl refuses its settings"),
        (lambda: Mixture({"ce": 1, "kl": {"weight": 1, "beta": 0.5}}), "has ce twice"),
        (lambda: Mixture({"feature": 1}), "does not train what the depths predict"),
        (lambda: Mixture({"own": {"weight": 1, "term": "x"}}), "terms.own must be {weight"),
        (
            lambda: Anchor(latent=0, semantic=0),
            "anchor.latent=0 and anchor.semantic=0 leave nothing",
        ),
        (lambda: Anchor(padded=1), "anchor.padded must be true or false"),  # type: ignore[arg-type]
        (lambda: Anchor(semantic=-1), "anchor.semantic must be a number of at least 0"),
        (lambda: Mixture({"anchor": 1}), "does not train what the depths predict"),
        (lambda: Objective(term=KL(), train_head="no"), "objective.train_head must be true or"),
    ],
)
def test_wrong_settings_are_refused(build_it: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_it()


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

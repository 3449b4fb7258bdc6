"""What rests on all depths of a position: end-to-end acceptance, weights, the mask, confidence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective import through_head
from mtp_lightning.objective.entropy_mask import EntropyMask
from mtp_lightning.objective.objective import Objective, count_taught
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.e2e_tv import E2ETV
from mtp_lightning.objective.terms.kl import KL
from mtp_lightning.objective.terms.mixture import Mixture
from mtp_lightning.objective.terms.tv import TV
from tests.losses import mtp_loss, step_of
from tests.models import build, windows
from tests.objective.teaching import Position, alpha, gradients, kl

VARIANTS = ["sequential", "parallel", "linear", "parameter_free"]
DEPTH = 3
LAMBDAS = [0.5, 0.25, 0.125]


@pytest.fixture(autouse=True)
def _chunks_that_straddle_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(through_head, "chunk_rows", lambda *_: 7)


def made(trunk: TrunkConfig, variant: str, depth: int = DEPTH, **switches: Any) -> MTPModel:
    return build(trunk, MTPConfig.find(variant)(depth=depth, **switches)).double()


def batches(depth: int = DEPTH) -> dict[str, WindowBatch]:
    """Without a mask, in documents, and with prompts that are not scored."""
    plain = windows(2, 9, depth)
    generator = torch.Generator().manual_seed(3)
    scored = torch.rand(plain.tokens.shape, generator=generator) < 0.7
    documents = (torch.arange(plain.tokens.shape[1]) // 6).expand_as(plain.tokens)
    return {
        "plain": plain,
        "documents": WindowBatch(plain.tokens, depth, documents),
        "prompts": WindowBatch(plain.tokens, depth, None, scored),
    }


class Reference:
    """Everything of a batch, position by position, in float64."""

    def __init__(self, model: MTPModel, batch: WindowBatch) -> None:
        self.batch, self.depth = batch, model.depth
        self.states = model(batch)
        self.log_q = {k: torch.log_softmax(model.head(h), -1) for k, h in self.states.items()}
        self.log_p = self.log_q[0].detach()

    def places(self) -> list[tuple[int, int]]:
        return [(b, t) for b in range(len(self.batch)) for t in range(self.batch.seq_len)]

    def valid(self, k: int, b: int, t: int, *, taught: bool) -> bool:
        seen = not taught or t + k < self.batch.seq_len
        return seen and int(self.batch.targets(k)[b, t]) >= 0

    def at(self, k: int, b: int, t: int) -> Position:
        u = min(t + k, self.batch.seq_len - 1)
        target = max(int(self.batch.targets(k)[b, t]), 0)
        main = self.states[0][b, u].detach()
        return Position(self.log_q[k][b, t], self.log_p[b, u], target, self.states[k][b, t], main)

    def q(self, k: int, b: int, t: int) -> Tensor:
        at = self.at(k, b, t)
        return at.log_q[at.target].exp()

    def main_loss(self) -> Tensor:
        losses = [
            -self.log_q[0][b, t, int(self.batch.targets(0)[b, t])]
            for b, t in self.places()
            if self.valid(0, b, t, taught=False)
        ]
        return torch.stack(losses).mean()


def check(model: MTPModel, batch: WindowBatch, term: Term | Objective, want: Tensor) -> None:
    total, _ = mtp_loss(model, batch, LAMBDAS[: model.depth], batch.counts().tolist(), term=term)
    assert total.item() == pytest.approx(want.item(), rel=1e-6)
    total.backward()
    found = gradients(model)
    want.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("masked", ["plain", "documents", "prompts"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_end_to_end_acceptance(tiny_trunk: TrunkConfig, variant: str, masked: str) -> None:
    model, batch = made(tiny_trunk, variant), batches()[masked]
    ref = Reference(model, batch)
    want = ref.main_loss()
    counts = count_taught(batch).tolist()
    for b, t in ref.places():
        product = torch.ones((), dtype=torch.float64)
        for j in range(1, DEPTH + 1):
            if ref.valid(j, b, t, taught=True):
                product = product * alpha(ref.at(j, b, t))
                want = want + LAMBDAS[j - 1] * (1 - product) / counts[j]
    check(model, batch, E2ETV(), want)


def test_end_to_end_acceptance_is_the_papers(tiny_trunk: TrunkConfig) -> None:
    """arXiv 2606.12370, eq. 13, where every depth counts: with one lambda, its mean over depths."""
    model, batch = made(tiny_trunk, "sequential"), batches()["plain"]
    ref = Reference(model, batch)
    _, sums = mtp_loss(model, batch, [1.0] * DEPTH, batch.counts().tolist(), term=E2ETV())
    inner = [(b, t) for b, t in ref.places() if t + DEPTH < batch.seq_len]
    want = 0.0
    for b, t in inner:
        products = [
            math.prod(alpha(ref.at(i, b, t)).item() for i in range(1, j + 1))
            for j in range(1, DEPTH + 1)
        ]
        want += 1 - sum(products) / DEPTH
    outer = 0.0  # what the shallower depths have beyond that
    for b, t in set(ref.places()) - set(inner):
        product = 1.0
        for j in range(1, batch.seq_len - t):
            product *= alpha(ref.at(j, b, t)).item()
            outer += 1 - product
    assert sums[1:].sum().item() == pytest.approx(DEPTH * want + outer, rel=1e-6)


def test_of_one_depth_it_is_total_variation(tiny_trunk: TrunkConfig) -> None:
    model, batch = made(tiny_trunk, "sequential", 1), windows(2, 9, 1)
    found = []
    for term in (E2ETV(), TV()):
        total, sums = mtp_loss(model, batch, [0.5], [18, 18], term=term)
        total.backward()
        found.append((total, sums, gradients(model)))
    (total, sums, grads), (want_total, want_sums, want_grads) = found
    torch.testing.assert_close(total, want_total)
    torch.testing.assert_close(sums, want_sums)
    for name, gradient in want_grads.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("masked", ["plain", "prompts"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_by_acceptance(tiny_trunk: TrunkConfig, variant: str, masked: str) -> None:
    """D-PACE (arXiv 2605.18810), with a mixture of terms."""
    model, batch = made(tiny_trunk, variant), batches()[masked]
    ref, a = Reference(model, batch), 0.3
    counts, taught = batch.counts().tolist(), count_taught(batch).tolist()
    want = ref.main_loss()
    for b, t in ref.places():
        reached: dict[int, float] = {}
        product = 1.0
        for k in range(1, DEPTH + 1):
            if ref.valid(k, b, t, taught=False):
                product *= (1 - a) * ref.q(k, b, t).item() + a
                reached[k] = product
        for k in reached:
            weight = LAMBDAS[k - 1] * sum(p for i, p in reached.items() if i >= k)
            want = want - weight * 0.7 * ref.q(k, b, t).log() / counts[k]
            if ref.valid(k, b, t, taught=True):
                want = want + weight * 0.3 * kl(ref.at(k, b, t)) / taught[k]
    term = Mixture({"ce": 0.7, "kl": 0.3})
    check(model, batch, Objective(term=term, weights="acceptance", smoothing=a), want)


def test_weights_of_depths_fall(tiny_trunk: TrunkConfig) -> None:
    model, batch = made(tiny_trunk, "parallel"), batches()["documents"]
    counts = batch.counts().tolist()
    plain = mtp_loss(model, batch, LAMBDAS, counts)[1]
    _, sums = mtp_loss(
        model,
        batch,
        LAMBDAS,
        counts,
        term=Objective(term=CrossEntropy(), weights="exp_decay", decay=2),
    )
    for k in range(1, DEPTH + 1):
        assert sums[k].item() == pytest.approx(plain[k].item() * math.exp(-(k - 1) / 2), rel=1e-6)


def jumps(ref: Reference, b: int, t: int, k: int, tau: float) -> bool:
    """Whether the entropy jumps within t .. t + k + 1."""
    entropy = (-(ref.log_p.exp() * ref.log_p).sum(-1))[b].tolist()
    steps = range(t, min(t + k + 1, len(entropy) - 1))
    return any(entropy[s + 1] - entropy[s] > tau for s in steps)


@pytest.mark.parametrize("masked", ["plain", "documents"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mask_leaves_out_what_crosses_a_jump(
    tiny_trunk: TrunkConfig, variant: str, masked: str
) -> None:
    model, batch = made(tiny_trunk, variant), batches()[masked]
    ref = Reference(model, batch)
    entropy = -(ref.log_p.exp() * ref.log_p).sum(-1)
    changes = entropy.diff(dim=1).flatten().sort().values
    tau = changes[-5:-3].mean().item()  # between two of them: four are jumps
    counts = batch.counts().tolist()
    want = ref.main_loss()
    kept = 0
    for k in range(1, DEPTH + 1):
        for b, t in ref.places():
            if ref.valid(k, b, t, taught=False) and not jumps(ref, b, t, k, tau):
                want = want - LAMBDAS[k - 1] * ref.q(k, b, t).log() / counts[k]
                kept += 1
    assert 0 < kept < sum(counts[1:])
    check(model, batch, Objective(term=CrossEntropy(), mask="entropy", tau=tau), want)


@pytest.mark.parametrize("variant", ["sequential", "parallel"])
def test_an_infinite_jump_masks_nothing(tiny_trunk: TrunkConfig, variant: str) -> None:
    model, batch = made(tiny_trunk, variant), batches()["documents"]
    found = []
    for objective in (
        Objective(term=KL()),
        Objective(term=KL(), mask="entropy", tau=math.inf),
        Objective(term=KL(), mask="entropy"),  # a running quantile that knows nothing yet
    ):
        total, sums = mtp_loss(model, batch, LAMBDAS, batch.counts().tolist(), term=objective)
        total.backward()
        found.append((total, sums, gradients(model)))
    for total, sums, grads in found[1:]:
        assert torch.equal(total, found[0][0]) and torch.equal(sums, found[0][1])
        assert all(torch.equal(gradient, found[0][2][name]) for name, gradient in grads.items())


def test_the_running_quantile_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = EntropyMask(None, quantile=0.9)
    assert mask.tau == math.inf
    tokens = {0: torch.zeros(8, 500).long(), 1: torch.zeros(8, 500).long()}
    for _ in range(3):
        mask.keep(torch.randn(8, 500, generator=generator), tokens)
        values = mask.learn()
    exact = torch.randn(100_000, generator=generator) * math.sqrt(2)
    assert mask.tau == pytest.approx(exact.quantile(0.9).item(), abs=0.15)
    # Of two steps between positions neither may be a jump.
    assert 0.7 < values["objective/kept_depth_1"] < 0.9
    other = EntropyMask(None, quantile=0.9)
    other.load_state_dict(mask.state_dict())
    assert other.tau == mask.tau and other.state_dict() == mask.state_dict()


@pytest.mark.parametrize("variant", VARIANTS)
def test_confidence_learns_the_acceptance(tiny_trunk: TrunkConfig, variant: str) -> None:
    model, batch = made(tiny_trunk, variant, confidence=True), batches()["documents"]
    head = model.mtp.confidence
    assert head is not None
    ref = Reference(model, batch)
    counts, taught = batch.counts().tolist(), count_taught(batch).tolist()
    want = ref.main_loss()
    errors = [0.0] * (DEPTH + 1)
    for k in range(1, DEPTH + 1):
        for b, t in ref.places():
            if ref.valid(k, b, t, taught=False):
                want = want - LAMBDAS[k - 1] * ref.q(k, b, t).log() / counts[k]
            if ref.valid(k, b, t, taught=True):
                x, y = ref.states[k][b, t], alpha(ref.at(k, b, t)).detach()
                sure = torch.sigmoid(head.weight[k - 1] @ x + head.bias[k - 1])
                loss = -(y * sure.log() + (1 - y) * (1 - sure).log())
                want = want + LAMBDAS[k - 1] * loss / taught[k]
                errors[k] += (sure - y).abs().item()
    objective = Objective(term=CrossEntropy(), confidence=True)
    _, sums = mtp_loss(model, batch, LAMBDAS, counts, term=objective)
    for k in range(1, DEPTH + 1):
        assert sums[k, 2].item() == pytest.approx(errors[k], rel=1e-6)
    check(model, batch, objective, want)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "e2e_tv": {"term": E2ETV()},
    "kl": {"term": KL(beta=0.5)},
    "weights": {"term": CrossEntropy(), "weights": "acceptance"},
    "mask": {"term": E2ETV(), "mask": "entropy", "tau": 0.0},
    "all": {
        "term": Mixture({"kl": 1, "e2e_tv": 0.5, "feature": 0.1}),
        "weights": "acceptance",
        "mask": "entropy",
        "tau": 0.0,
        "confidence": True,
    },
}


@pytest.mark.parametrize("variant", ["sequential", "parallel", "parameter_free"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_in_parts_is_the_step(tiny_trunk: TrunkConfig, name: str, variant: str) -> None:
    settings = OBJECTIVES[name]
    batch = batches()["documents"]
    batch = batch.map(lambda field: torch.cat((field, field.flip(0) + 1)))
    found = []
    for accumulate in (1, 3):
        confidence = settings.get("confidence", False)
        model = made(tiny_trunk, variant, confidence=confidence)
        step = step_of(model, Objective(**settings), accumulate=accumulate)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        result = step(batch, Progress(step=0, max_steps=10), optimizer)
        values = {tag: float(value) for tag, value in result.log_values().items()}
        found.append((values, {n: p.detach() for n, p in model.named_parameters()}))
    (values, weights), (other_values, other_weights) = found
    assert values == pytest.approx(other_values, rel=1e-6)
    for tag in ("train/loss_depth_1", "confidence/error_depth_3") if name == "all" else ():
        assert values[tag] > 0
    for n, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[n], rtol=1e-6, atol=1e-8, msg=n)
    # What is logged adds up: factors times losses, and weights times terms.
    lambdas = [values[f"train/lambda_depth_{k}"] for k in (1, 2, 3)]
    losses = [values[f"train/loss_depth_{k}"] for k in range(4)]
    total = losses[0] + sum(w * loss for w, loss in zip(lambdas, losses[1:], strict=True))
    assert values["train/loss"] == pytest.approx(total)
    parts = {term.tag(2): weight for weight, term in step.objective.parts}
    if len(parts) > 1:
        assert losses[2] == pytest.approx(sum(w * values[tag] for tag, w in parts.items()))


SWITCHES: list[dict[str, Any]] = [{}, {"detach": "all"}, {"freeze_trunk": True}]
SWITCHED = [
    (variant, switches)
    for variant in VARIANTS
    for switches in (SWITCHES[:1] if variant == "parameter_free" else SWITCHES)
]


@pytest.mark.parametrize("variant, switches", SWITCHED, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_flops_are_those_of_pytorchs_operators(
    tiny_trunk: TrunkConfig, name: str, variant: str, switches: dict[str, Any]
) -> None:
    from tests.flops import counted_flops

    settings = OBJECTIVES[name]
    confidence = settings.get("confidence", False)
    for train_head in (True, False):
        model = made(tiny_trunk, variant, confidence=confidence, **switches)
        step = step_of(model, Objective(**settings, train_head=train_head))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        batch = batches()["documents"]
        with counted_flops() as counted:
            result = step(batch, Progress(step=0, max_steps=10), optimizer)
        assert result.plan.active == [1, 2, 3]
        assert result.flops == counted.total


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "heavy"}, "objective.weights=heavy is unknown: choose one of none, exp_decay"),
        ({"mask": "fog"}, "objective.mask=fog is unknown"),
        ({"decay": 2.0}, "decay=2.0 is read by objective.weights=exp_decay alone"),
        ({"smoothing": 0.5, "weights": "exp_decay"}, "read by objective.weights=acceptance alone"),
        ({"tau": 1.0}, "objective.tau=1.0 is read by objective.mask=entropy alone"),
        ({"weights": "exp_decay", "decay": 0}, "objective.decay must be a number above 0"),
        ({"weights": "acceptance", "smoothing": 2}, "smoothing must be a number in"),
        ({"mask": "entropy", "tau": math.nan}, "objective.tau .* must be a number"),
        ({"mask": "entropy", "quantile": 1}, r"objective.quantile must be a number in \(0, 1\)"),
        ({"mask": "entropy", "quantile": 0.5, "tau": 1.0}, "both say what a jump is"),
        ({"confidence": 1}, "objective.confidence must be true or false"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(term=CrossEntropy(), **settings)


@pytest.mark.parametrize("name", ["e2e_tv", "weights", "mask"])
def test_without_a_depth_there_is_nothing_to_act_on(tiny_trunk: TrunkConfig, name: str) -> None:
    model = build(tiny_trunk, MTPConfig.find("sequential")(depth=0))
    with pytest.raises(ValueError, match="has nothing to act on at mtp.depth=0"):
        step_of(model, Objective(**OBJECTIVES[name]))


@pytest.mark.parametrize("name", ["e2e_tv", "weights", "mask"])
def test_depths_that_leap_have_no_drafts_to_look_at(tiny_trunk: TrunkConfig, name: str) -> None:
    model = build(tiny_trunk, MTPConfig.find("linear")(depth=2, stride=2))
    with pytest.raises(ValueError, match="of which mtp.stride=2 leaves some out"):
        step_of(model, Objective(**OBJECTIVES[name]))
    with pytest.raises(ValueError, match="objective.confidence=true rests on every token"):
        step_of(model, Objective(term=KL(), confidence=True))
    step_of(model, Objective(term=KL(), weights="exp_decay"))

"""Every head with every objective, weights, mask and schedule: a step equals the one that
``whole.py`` computes, or is refused with one sentence.

The axes are read from conf/. A head, switch, objective or schedule that ``whole.py`` and the tables
of ``draws.py`` lack fails the test. All weights are random, also those that start at 0.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from data_modules.windows import RandomKey
from mtp_lightning.errors import UserError
from mtp_lightning.metrics.own_loss import own_values
from mtp_lightning.mtp import selector
from mtp_lightning.mtp.correction import CORRECTIONS
from mtp_lightning.objective import through_head
from mtp_lightning.objective.balance.base import Balance, NoBalance
from mtp_lightning.objective.balance.cosine_gate import CosineGate
from mtp_lightning.objective.balance.gradnorm import GradNorm
from mtp_lightning.objective.balance.uncertainty import Uncertainty
from mtp_lightning.objective.cost import counted_flops
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.rules.position_weights import PositionWeights
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.objective.terms.anchor import Anchor
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.mixture import known_terms
from tests.objective.draws import (
    HEADS_BY_NAME,
    OBJECTIVES,
    STEPS,
    SWITCHES,
    WEIGHTS,
    Case,
    built,
    drawn_batch,
    drawn_head,
    drawn_model,
    listed,
    product,
    schedules,
    some_of,
    target,
)
from tests.objective.states import HEADS
from tests.objective.whole import ACCEPTED, FORMULAS, LOGGED, Asked, Step

RULES = (GradNorm, CosineGate, Uncertainty)
CE = CrossEntropy()


class Kept(torch.optim.SGD):
    """An optimizer that keeps the gradients and does not change the weights."""

    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]
        self.found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


def begun(
    case: Case, draw: random.Random, rule: Callable[[int], Balance] = NoBalance
) -> tuple[OptimizerStep, Asked, int]:
    """An optimizer step, what its depths are trained on, and its number in the run.

    Raises:
        UserError: the case is refused, with random further options and without.
    """
    settings, mixture = draw.choice(OBJECTIVES[case.objective])
    said = listed("objective")[case.objective]
    term = built({k: v for k, v in said.items() if k not in Objective.options()}, **settings)
    own = {
        "weights": case.weights,
        "decay": draw.choice((None, 2.0)) if case.weights == "exp_decay" else None,
        "smoothing": draw.choice((None, 0.2)) if case.weights == "acceptance" else None,
        "mask": case.mask,
        "tau": 0.1 if case.mask == "entropy" else None,
    }
    drawn = {"train_head": draw.random() < 0.7, "confidence": draw.random() < 0.3}
    for options in (own | drawn, own):
        config = drawn_head(case, draw, confidence=options.get("confidence", False))
        if options is not own and not config.trains_trunk and draw.random() < 0.7:
            options = {**options, "draft_vocab": draw.choice((2, 7))}
        model, balance = drawn_model(config, draw.randrange(2**30)), rule(config.depth)
        # With a single depth, "some" is none.
        places = schedules(config.depth)[case.active] or schedules(config.depth)["none"]
        schedule, now = draw.choice(places)
        try:
            balance.check(model.config)
            step = OptimizerStep(
                model,
                schedule=schedule,
                balance=balance,
                objective=Objective(term=term, **options),
                seed=3,
                accumulate=draw.choice((1, 2)),
            )
            return step, Asked(mixture, **options), now
        except UserError as error:
            refused = error
    raise refused


def check(case: Case) -> str | None:
    """Compare a step with the definitions; return the message of a refusal, or None."""
    draw = random.Random(str(case))
    try:
        step, asked, now = begun(case, draw)
    except UserError as error:
        return str(error)
    model, progress = step.model, Progress(now, STEPS)
    batch = drawn_batch(model.config.mtp, draw)
    optimizer = Kept(model.parameters(), lr=1.0)
    counts = draw.random() < 0.25  # counting takes as long as everything else
    if not counts:
        step.cost = lambda *_, **__: 0  # type: ignore[assignment]
    with counted_flops() if counts else nullcontext() as counted:
        result = step(batch, progress, optimizer)
    want = Step(model, batch, RandomKey(step.seed, now), step.schedule.lambdas(progress), asked)
    found = {tag: float(value) for tag, value in result.values.items()}
    norm = float(sum(gradient.double().square().sum() for gradient in optimizer.found)) ** 0.5
    assert found == pytest.approx(want.logged | {"train/grad_norm": norm}, rel=1e-9)
    # If no position of a depth has a teacher, a step computes less than it counts.
    if counted is not None and all(want.taught[k].any() for k in result.plan.active):
        assert result.flops == counted.total
    keyed = replace(batch, key=RandomKey(step.seed, now))
    for k, hidden in model(keyed, result.plan.active).items():
        if k in want.log_q:
            log_q = torch.log_softmax(model.head_of(k)(hidden), -1)
            torch.testing.assert_close(log_q, want.log_q[k], rtol=1e-9, atol=1e-9)
        else:  # a summary has a matrix of its own
            values, valid = own_values(model.mtp, k, batch, hidden)
            mean = float((values * valid).sum() / valid.sum())
            assert mean == pytest.approx(want.logged[f"train/loss_depth_{k}"], rel=1e-9)
    wanted = gradients(want.total, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    for name, gradient, other in zip(names, optimizer.found, wanted, strict=True):
        # Masks and coefficients have single precision.
        assert (gradient - other).abs().max() <= 1e-6 * other.abs().max() + 1e-9, name
    return None


def gradients(total: Tensor, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients of ``total``; zeros for a parameter without one."""
    wanted = [p for p in parameters if p.requires_grad and total.requires_grad]
    found = torch.autograd.grad(total, wanted, allow_unused=True) if wanted else ()
    known = {id(p): g for p, g in zip(wanted, found, strict=True) if g is not None}
    return [known.get(id(p), torch.zeros_like(p)) for p in parameters]


def require_sentence(said: str | None, *named: str) -> None:
    """Check that a refusal is one sentence and has one of the words ``named``."""
    if said is not None:
        assert "\n" not in said and said.endswith(".") and len(said) < 400, said
        assert any(name in said for name in named), said


def check_all(cases: Iterator[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check all cases. At least four must not be refused; of heads that take everything, none."""
    monkeypatch.setattr(through_head, "chunk_rows", lambda *_: 7)  # chunks that cross windows
    monkeypatch.setattr(selector, "CANDIDATES", 4)
    monkeypatch.setattr(selector, "_NUMEL", 40)
    trained = 0
    for case in cases:
        try:
            said = check(case)
        except Exception as error:
            error.add_note(str(case))
            raise
        require_sentence(said, "objective")
        assert said is None or not case.takes_all, case
        trained += said is None
    assert trained >= 4


def test_the_tables_know_all_that_there_is() -> None:
    """Every option and every value of a switch occurs in the cases."""
    assert HEADS.keys() == listed("mtp").keys()
    for said in listed("mtp").values():
        config = target(said)
        hints = get_type_hints(config)
        own = {field.name for field in fields(config)} - {"depth", "confidence"}
        assert own <= SWITCHES.keys() and own <= said.keys()
        for name in own:
            if get_origin(hints[name]) is Literal:
                assert set(SWITCHES[name]) == set(get_args(hints[name])), name
    assert {*SWITCHES["correction"]} == {"none", *CORRECTIONS}
    assert OBJECTIVES.keys() == listed("objective").keys()
    formulas = {LOGGED.get(name, name) for name in FORMULAS | ACCEPTED}
    own_terms = {n for n, term in known_terms().items() if term.__module__.startswith("mtp_")}
    own_terms |= {part.name for _, part in Anchor().parts()}
    assert formulas == own_terms - {Anchor.name}
    assert set(Objective.options()) - {"quantile"} == {f.name for f in fields(Asked)} - {"mixture"}
    found = [Objective(term=CE, weights=word).rules for word in WEIGHTS]
    assert {type(rule) for rules in found for rule in rules} == {*PositionWeights.__subclasses__()}
    for depth, active in ((1, "all"), (2, "some"), (3, "some"), (3, "none")):
        assert schedules(depth)[active]


@pytest.mark.parametrize("name", HEADS_BY_NAME)
def test_a_step_is_its_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_all(some_of(*HEADS_BY_NAME[name]), monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("name", HEADS_BY_NAME)
def test_every_step_is_its_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_all(product(*HEADS_BY_NAME[name]), monkeypatch)


@pytest.mark.parametrize("name", HEADS_BY_NAME)
def test_a_step_in_bf16_is_near_one_in_fp32(name: str) -> None:
    near = []
    for objective, weights in zip(OBJECTIVES, itertools.cycle(WEIGHTS), strict=False):
        case = Case(*HEADS_BY_NAME[name], objective, weights, "none", "all", 0)
        found = []
        for low in (False, True):
            draw = random.Random(str(case))
            try:
                step, _, now = begun(case, draw)
            except UserError:
                break
            step.model.float()
            for matrix in (p for p in step.model.parameters() if p.dim() > 1):
                matrix.data *= 0.5  # for bf16, some are too large otherwise
            step.cost = lambda *_, **__: 0  # type: ignore[assignment]
            batch = drawn_batch(step.model.config.mtp, draw)
            optimizer = Kept(step.model.parameters(), lr=1.0)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = step(batch, Progress(now, STEPS), optimizer).loss
            found.append((float(loss), torch.cat([g.flatten() for g in optimizer.found])))
        else:
            (loss, gradient), (low_loss, low_gradient) = found
            assert low_loss == pytest.approx(loss, rel=0.02, abs=0.01), case
            near.append(float(torch.cosine_similarity(gradient, low_gradient, dim=0)))
    # Of some models all gradients are 0, or nearly.
    assert near and sorted(near)[len(near) // 4] > 0.99


@pytest.mark.long
@pytest.mark.parametrize("name", HEADS_BY_NAME)
def test_every_rule(name: str) -> None:
    """With random switches it trains, or is refused with one sentence."""
    for rule, objective, draw in itertools.product(RULES, ("kl", "e2e_tv", "ce"), range(4)):
        case = Case(*HEADS_BY_NAME[name], objective, "none", "none", "all", draw)
        drawn = random.Random(str(case))
        try:
            step, _, now = begun(case, drawn, rule)
        except UserError as error:
            require_sentence(str(error), "mtp.", "objective", "balance=", "mtp=")
            continue
        optimizer = torch.optim.SGD([*step.model.parameters(), *step.balance.parameters()], lr=0.01)
        batch = drawn_batch(step.model.config.mtp, drawn)
        assert torch.isfinite(step(batch, Progress(now, STEPS), optimizer).loss)

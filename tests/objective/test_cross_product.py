"""All heads with all objectives, weights, masks and schedules: a step equals the one that
``whole.py`` computes, or is refused with one sentence.

The axes are read from conf/: a new head, switch, objective or schedule fails a test until
``whole.py`` and the tables of ``draws.py`` have it. All weights are random, also those that usually
start at 0.
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
from mtp_lightning.metrics.rates import own_values
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
from tests.objective.whole import ACCEPTED, FORMULAS, LOGGED, DepthObjective, Step

RULES = (GradNorm, CosineGate, Uncertainty)
CE = CrossEntropy()


class RecordGradients(torch.optim.SGD):
    """An optimizer that records the gradients and does not change the weights."""

    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]
        self.gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters
        ]


def step_of_case(
    case: Case, draw: random.Random, rule: Callable[[int], Balance] = NoBalance
) -> tuple[OptimizerStep, DepthObjective, int]:
    """An optimizer step, the objective of its depths, and its number in the run.

    Raises:
        UserError: the case is refused, with random further options and without.
    """
    settings, mixture = draw.choice(OBJECTIVES[case.objective])
    defaults = listed("objective")[case.objective]
    term = built({k: v for k, v in defaults.items() if k not in Objective.options()}, **settings)
    required = {
        "weights": case.weights,
        "decay": draw.choice((None, 2.0)) if case.weights == "exp_decay" else None,
        "smoothing": draw.choice((None, 0.2)) if case.weights == "acceptance" else None,
        "mask": case.mask,
        "tau": 0.1 if case.mask == "entropy" else None,
    }
    drawn = {"train_head": draw.random() < 0.7, "confidence": draw.random() < 0.3}
    for options in (required | drawn, required):
        config = drawn_head(case, draw, confidence=options.get("confidence", False))
        if options is not required and not config.trains_trunk and draw.random() < 0.7:
            options = {**options, "draft_vocab": draw.choice((2, 7))}
        model, balance = drawn_model(config, draw.randrange(2**30)), rule(config.depth)
        # A single depth is never "some" depths.
        places = schedules(config.depth)[case.active] or schedules(config.depth)["none"]
        schedule, now = draw.choice(places)
        try:
            step = OptimizerStep(
                model,
                schedule=schedule,
                balance=balance,
                objective=Objective(term=term, **options),
                seed=3,
                accumulate=draw.choice((1, 2)),
            )
            return step, DepthObjective(mixture, **options), now
        except UserError as error:
            refused = error
    raise refused


def check(case: Case) -> str | None:
    """Compare a step with the definitions; return the message of a refusal, or None."""
    draw = random.Random(str(case))
    try:
        step, objective, now = step_of_case(case, draw)
    except UserError as error:
        return str(error)
    model, progress = step.model, Progress(now, STEPS)
    batch = drawn_batch(model.config.mtp, draw)
    optimizer = RecordGradients(model.parameters(), lr=1.0)
    counts = draw.random() < 0.1  # counting FLOPs takes as long as the rest
    if not counts:
        step.cost = lambda *_, **__: 0  # type: ignore[assignment]
    with counted_flops() if counts else nullcontext() as counted:
        result = step(batch, progress, optimizer)
    lambdas = step.schedule.lambdas(progress)
    expected = Step(model, batch, RandomKey(step.seed, now), lambdas, objective)
    logged = {tag: float(value) for tag, value in result.values.items()}
    norm = float(sum(gradient.double().square().sum() for gradient in optimizer.gradients)) ** 0.5
    assert logged == pytest.approx(expected.logged | {"train/grad_norm": norm}, rel=1e-9)
    # If no position of a depth has a teacher, a step computes less than it counts.
    if counted is not None and all(expected.taught[k].any() for k in result.plan.active):
        assert result.flops == counted.total
    keyed = replace(batch, key=RandomKey(step.seed, now))
    for k, hidden in model(keyed, result.plan.active).items():
        if k in expected.log_q:
            log_q = torch.log_softmax(model.head_of(k)(hidden), -1)
            torch.testing.assert_close(log_q, expected.log_q[k], rtol=1e-9, atol=1e-9)
        else:  # a summary of the tokens ahead
            values, valid = own_values(model.mtp, k, batch, hidden)
            mean = float((values * valid).sum() / valid.sum())
            assert mean == pytest.approx(expected.logged[f"train/loss_depth_{k}"], rel=1e-9)
    exact = gradients(expected.total, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    for name, gradient, reference in zip(names, optimizer.gradients, exact, strict=True):
        # Masks and coefficients have single precision.
        assert (gradient - reference).abs().max() <= 1e-6 * reference.abs().max() + 1e-9, name
    return None


def gradients(total: Tensor, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients of ``total``; zeros for a parameter without one."""
    trained = [p for p in parameters if p.requires_grad and total.requires_grad]
    grads = torch.autograd.grad(total, trained, allow_unused=True) if trained else ()
    by_id = {id(p): g for p, g in zip(trained, grads, strict=True) if g is not None}
    return [by_id.get(id(p), torch.zeros_like(p)) for p in parameters]


def require_sentence(message: str | None, *names: str) -> None:
    """Check that a refusal is one sentence with one of the names."""
    if message is not None:
        assert "\n" not in message and message.endswith(".") and len(message) < 400, message
        assert any(name in message for name in names), message


def check_all(cases: Iterator[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check all cases. At least four must not be refused, and none of heads that take all
    objectives."""
    monkeypatch.setattr(through_head, "chunk_rows", lambda *_: 7)  # chunks that cross windows
    monkeypatch.setattr(selector, "CANDIDATES", 4)
    monkeypatch.setattr(selector, "_NUMEL", 40)
    trained = 0
    for case in cases:
        # A head may refuse the weights and the mask.
        for attempt in (case, replace(case, weights="none", mask="none", active="all")):
            try:
                refusal = check(attempt)
            except Exception as error:
                error.add_note(str(attempt))
                raise
            if refusal is None:
                trained += 1
                break
            require_sentence(refusal, "objective")
            assert not case.takes_all, case
    assert trained >= 4


def test_the_tables_have_every_head_switch_and_objective() -> None:
    assert HEADS.keys() == listed("mtp").keys()
    for settings in listed("mtp").values():
        config = target(settings)
        hints = get_type_hints(config)
        switches = {field.name for field in fields(config)} - {"depth", "confidence"}
        assert switches <= SWITCHES.keys() and switches <= settings.keys()
        for name in switches:
            if get_origin(hints[name]) is Literal:
                assert set(SWITCHES[name]) == set(get_args(hints[name])), name
    assert {*SWITCHES["correction"]} == {"none", *CORRECTIONS}
    assert OBJECTIVES.keys() == listed("objective").keys()
    formulas = {LOGGED.get(name, name) for name in FORMULAS | ACCEPTED}
    terms = {n for n, term in known_terms().items() if term.__module__.startswith("mtp_")}
    terms |= {part.name for _, part in Anchor().parts()}
    assert formulas == terms - {Anchor.name}
    assert set(Objective.options()) - {"quantile"} == {f.name for f in fields(DepthObjective)} - {
        "mixture"
    }
    rules = [rule for word in WEIGHTS for rule in Objective(term=CE, weights=word).rules]
    assert set(map(type, rules)) == {*PositionWeights.__subclasses__()}
    for depth, active in ((1, "all"), (2, "some"), (3, "some"), (3, "none")):
        assert schedules(depth)[active]


@pytest.mark.parametrize("name", HEADS_BY_NAME)
def test_steps_equal_their_definitions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_all(some_of(*HEADS_BY_NAME[name]), monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("name", HEADS_BY_NAME)
def test_all_steps_equal_their_definitions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_all(product(*HEADS_BY_NAME[name]), monkeypatch)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if "=" in n else []) for n in HEADS_BY_NAME],
)
def test_steps_in_bf16_have_about_the_gradients_of_fp32(name: str) -> None:
    similarities = []
    first = list(HEADS_BY_NAME).index(name) % 3
    objectives = ["ce", *list(OBJECTIVES)[first::3]]
    for objective, weights in zip(objectives, itertools.cycle(WEIGHTS), strict=False):
        case = Case(*HEADS_BY_NAME[name], objective, weights, "none", "all", 0)
        steps = []
        for low in (False, True):
            draw = random.Random(str(case))
            try:
                step, _, now = step_of_case(case, draw)
            except UserError:
                break
            step.model.float()
            for matrix in (p for p in step.model.parameters() if p.dim() > 1):
                matrix.data *= 0.5  # some are too large for bf16
            step.cost = lambda *_, **__: 0  # type: ignore[assignment]
            batch = drawn_batch(step.model.config.mtp, draw)
            optimizer = RecordGradients(step.model.parameters(), lr=1.0)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = step(batch, Progress(now, STEPS), optimizer).loss
            steps.append((float(loss), torch.cat([g.flatten() for g in optimizer.gradients])))
        else:
            (loss, gradient), (low_loss, low_gradient) = steps
            assert low_loss == pytest.approx(loss, rel=0.02, abs=0.01), case
            assert low_gradient.isfinite().all(), case
            if gradient.norm() > 1e-3:  # some models have gradients of 0, or nearly
                similarity = torch.cosine_similarity(gradient, low_gradient, dim=0)
                similarities.append((float(similarity), case))
    assert similarities and min(similarities)[0] > 0.97, min(similarities)


@pytest.mark.long
@pytest.mark.parametrize("name", HEADS_BY_NAME)
def test_every_balance_rule_trains_or_is_refused_with_one_sentence(name: str) -> None:
    for rule, objective, draw in itertools.product(RULES, ("kl", "e2e_tv", "ce"), range(4)):
        case = Case(*HEADS_BY_NAME[name], objective, "none", "none", "all", draw)
        drawn = random.Random(str(case))
        try:
            step, _, now = step_of_case(case, drawn, rule)
        except UserError as error:
            require_sentence(str(error), "mtp.", "objective", "balance=", "mtp=")
            continue
        optimizer = torch.optim.SGD([*step.model.parameters(), *step.balance.parameters()], lr=0.01)
        batch = drawn_batch(step.model.config.mtp, drawn)
        assert torch.isfinite(step(batch, Progress(now, STEPS), optimizer).loss)

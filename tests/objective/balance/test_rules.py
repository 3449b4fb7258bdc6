"""The balance rules against the formulas of their papers in float64, their states and limits."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from mtp_lightning.objective.balance.base import Balance, NoBalance, Observed
from mtp_lightning.objective.balance.cosine_gate import CosineGate
from mtp_lightning.objective.balance.dwa import DWA
from mtp_lightning.objective.balance.gradients import TaskGradients
from mtp_lightning.objective.balance.gradnorm import GradNorm
from mtp_lightning.objective.balance.random_weights import RandomWeights
from mtp_lightning.objective.balance.sampled_depths import SampledDepths
from mtp_lightning.objective.balance.trunk_ratio import TrunkRatio
from mtp_lightning.objective.balance.uncertainty import Uncertainty
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.run.checkpoints import require_plain

BASE = [1.0, 0.3, 0.1]
LOSSES = [[6.0, 7.0, 8.0], [5.0, 6.5, 7.9], [4.5, 5.0, 7.0], [4.0, 5.2, 6.0], [3.9, 4.1, 6.1]]


def at(step: int, max_steps: int = 100) -> Progress:
    return Progress(step=step, max_steps=max_steps)


def feed(
    rule: Balance,
    step: int,
    losses: list[float],
    *,
    lambdas: list[float] = BASE,
    gradients: TaskGradients | None = None,
) -> dict[str, float]:
    factors = rule.factors(lambdas, at(step))
    if gradients is not None:
        rule.gate(lambdas, gradients)
    computed = real([x if f else 0.0 for x, f in zip(losses, factors, strict=True)])
    return rule.update(
        Observed(
            progress=at(step),
            lambdas=lambdas,
            factors=factors,
            losses=computed,
            gradients=gradients,
        )
    )


def real(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def vectors(*values: list[float]) -> TaskGradients:
    parameter = torch.nn.Parameter(torch.zeros(len(values[0]), dtype=torch.float64))
    return TaskGradients({k: real(v) for k, v in enumerate(values)}, [parameter])


def softmax(scores: list[float]) -> list[float]:
    exps = [math.exp(s) for s in scores]
    return [e / sum(exps) for e in exps]


def test_without_a_rule_the_factors_are_those_of_the_schedule() -> None:
    assert NoBalance(2).factors(BASE, at(0)) == BASE
    assert NoBalance(2).parameters() == [] and not NoBalance(2).skips


def test_dwa_equals_its_formula() -> None:
    rule = DWA(2, temperature=2.0, window_steps=2)
    stream = [loss for loss in LOSSES for _ in range(2)]
    # The second step of a window has other losses, since the rule uses their mean.
    stream[1] = [5.0, 9.0, 7.0]
    for step, losses in enumerate(stream):
        window = step // 2
        factors = rule.factors(BASE, at(step))
        if window < 2:
            assert factors == pytest.approx(BASE, rel=1e-12)
        else:
            means = [
                [(a + b) / 2 for a, b in zip(stream[2 * w], stream[2 * w + 1], strict=True)]
                for w in (window - 2, window - 1)
            ]
            ratios = [new / old for old, new in zip(*means, strict=True)]
            weights = [3 * s for s in softmax([r / 2.0 for r in ratios])]
            expected = [w * b for w, b in zip(weights, BASE, strict=True)]
            assert factors == pytest.approx(expected, rel=1e-12)
            assert sum(f / b for f, b in zip(factors, BASE, strict=True)) == pytest.approx(3)
        feed(rule, step, losses)


def test_dwa_takes_the_mean_of_the_steps_in_which_a_depth_was_computed() -> None:
    rule, seldom = DWA(2, window_steps=2), [1.0, 0.3, 0.0]
    for step in range(4):
        feed(rule, step, LOSSES[step], lambdas=seldom if step == 2 else BASE)
    first, second = [(a + b) / 2 for a, b in zip(LOSSES[0], LOSSES[1], strict=True)], LOSSES[3]
    ratios = [(LOSSES[2][k] + second[k]) / 2 / first[k] for k in (0, 1)] + [second[2] / first[2]]
    assert rule.ratios().tolist() == pytest.approx(ratios)


def test_dwa_ignores_a_depth_of_weight_0_and_starts_a_new_one_with_ratio_1() -> None:
    rule = DWA(2, window_steps=1)
    off = [1.0, 0.3, 0.0]
    for step in range(3):
        feed(rule, step, LOSSES[step], lambdas=off)
    ratios = [LOSSES[2][k] / LOSSES[1][k] for k in (0, 1)]
    two = [2 * s for s in softmax([r / 2 for r in ratios])]
    assert rule.factors(off, at(3)) == pytest.approx([two[0], 0.3 * two[1], 0.0])
    three = [3 * s for s in softmax([r / 2 for r in [*ratios, 1.0]])]
    expected = [w * b for w, b in zip(three, BASE, strict=True)]
    assert rule.factors(BASE, at(3)) == pytest.approx(expected)


def test_uncertainty_has_the_gradient_of_the_published_objective() -> None:
    rule = Uncertainty(2)
    with torch.no_grad():
        for s, value in zip(rule.parameters(), (0.3, -0.2, 0.5), strict=True):
            s.fill_(value)
    factors = rule.factors(BASE, at(0))
    assert factors == pytest.approx(
        [b * math.exp(-s) for b, s in zip(BASE, (0.3, -0.2, 0.5), strict=True)]
    )
    feed(rule, 0, LOSSES[0])
    s = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    lambdas, losses = real(BASE), real(LOSSES[0])
    (lambdas * (losses * torch.exp(-s) + s / 2)).sum().backward()
    assert s.grad is not None
    gradient = torch.stack([p.grad for p in rule.parameters()])  # type: ignore[misc]
    torch.testing.assert_close(gradient, s.grad, rtol=1e-12, atol=0)
    off = Uncertainty(2)
    feed(off, 0, LOSSES[0], lambdas=[1.0, 0.3, 0.0])
    assert [p.grad is None for p in off.parameters()] == [False, False, True]


def test_gradnorm_moves_weights_along_the_gradient_of_its_paper() -> None:
    rule = GradNorm(2, alpha=1.5, lr=0.025)
    norms = [[2.0, 0.5, 1.0], [1.5, 0.9, 0.2], [1.0, 1.0, 1.0]]
    weights = [1.0, 1.0, 1.0]
    for step, (losses, sizes) in enumerate(zip(LOSSES, norms, strict=False)):
        assert rule.factors(BASE, at(step)) == pytest.approx(
            [w * b for w, b in zip(weights, BASE, strict=True)], rel=1e-12
        )
        feed(rule, step, losses, gradients=vectors(*([n, 0.0] for n in sizes)))
        # Autograd differentiates the paper's loss on the weights, with constant targets.
        w = real(weights).requires_grad_()
        g = w * real(sizes)
        ratio = real([x / y for x, y in zip(losses, LOSSES[0], strict=True)])
        target = (g.mean() * (ratio / ratio.mean()) ** 1.5).detach()
        (grad,) = torch.autograd.grad((g - target).abs().sum(), w)
        moved = (w - 0.025 * grad).detach()
        weights = (moved * 3 / moved.sum()).tolist()
    assert sum(weights) == pytest.approx(3) and weights != pytest.approx([1.0] * 3)
    assert rule.factors(BASE, at(9)) == pytest.approx(
        [w * b for w, b in zip(weights, BASE, strict=True)]
    )


def test_gradnorm_raises_the_rates_of_training_to_the_power_alpha() -> None:
    rule = GradNorm(2, alpha=1.5)
    feed(rule, 0, LOSSES[0])
    # The main rate is 0.909, and 0.909^1.5 = 0.867: its gradient is above the target.
    feed(rule, 1, LOSSES[1], gradients=vectors([0.89], [1.05], [1.06]))
    assert rule.factors([1.0, 1.0, 1.0], at(2))[0] < 1


def test_gradnorm_keeps_weights_positive_and_measures_every_n_steps() -> None:
    rule = GradNorm(1, lr=10.0, every_n_steps=3)
    assert [rule.measures_at(at(s)) for s in range(6)] == [False, False, True] * 2
    feed(rule, 0, [5.0, 5.0], lambdas=[1.0, 1.0])
    assert rule.factors([1.0, 1.0], at(1)) == [1.0, 1.0]
    feed(rule, 2, [5.0, 5.0], lambdas=[1.0, 1.0], gradients=vectors([9.0], [0.1]))
    weights = rule.factors([1.0, 1.0], at(3))
    assert min(weights) > 0 and sum(weights) == pytest.approx(2)
    # A depth of weight 0 keeps its weight, and the other two sum to 2.
    wide = GradNorm(2)
    feed(wide, 0, LOSSES[0], lambdas=[1.0, 0.3, 0.0], gradients=vectors([2.0], [0.5]))
    main, first, off = wide.factors([1.0, 1.0, 1.0], at(1))
    assert off == 1.0 and main + first == pytest.approx(2) and main < 1 < first


def test_cosine_gate_removes_an_opposing_depth_from_the_trunks_gradient() -> None:
    rule = CosineGate(2, ema=0.0)
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    g = [real(v) for v in ([1.0, 0.0], [-0.5, 2.0], [0.1, 1.0])]
    parameter.grad = g[0] + 0.3 * g[1] + 0.1 * g[2]
    gradients = TaskGradients(dict(enumerate(g)), [parameter])
    values = feed(rule, 0, LOSSES[0], gradients=gradients)
    torch.testing.assert_close(parameter.grad, g[0] + 0.1 * g[2])
    assert values["balance/gate_depth_1"] == 0 and values["balance/gate_depth_2"] == 1
    assert values["balance/cosine_depth_1"] == pytest.approx(-0.5 / math.hypot(0.5, 2.0))
    # The factors of the losses do not change: the modules keep learning.
    assert rule.factors(BASE, at(1)) == BASE


def test_cosine_gate_decides_by_a_moving_average_of_cosines() -> None:
    rule = CosineGate(1, ema=0.9)
    average = None
    for step, cosine in enumerate([0.5, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0]):
        average = cosine if average is None else 0.9 * average + 0.1 * cosine
        parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        other = real([cosine, math.sqrt(1 - cosine**2)])
        main = real([1.0, 0.0])
        parameter.grad = main + 0.3 * other
        expected = main + 0.3 * other * (average >= 0)
        gradients = TaskGradients({0: main, 1: other}, [parameter])
        values = feed(rule, step, [5.0, 5.0], lambdas=[1.0, 0.3], gradients=gradients)
        assert values["balance/cosine_depth_1"] == pytest.approx(average)
        torch.testing.assert_close(parameter.grad, expected)
    assert average < 0


def test_trunk_ratio_equals_its_formula() -> None:
    rule = TrunkRatio(2, rate=0.01, ratio=0.3, ema=0.9, every_n_steps=1)
    lambdas, average = [0.3, 0.1], [None, None]
    for step in range(40):
        sizes = [2.0, 1.0 + math.sin(step), 0.5 + 0.2 * step]
        assert rule.factors(BASE, at(step)) == pytest.approx([1.0, *lambdas], rel=1e-12)
        feed(rule, step, LOSSES[0], gradients=vectors(*([n, 0.0] for n in sizes)))
        for i in range(2):
            share = lambdas[i] * sizes[i + 1] / sizes[0]
            before = average[i]
            average[i] = share if before is None else 0.9 * before + 0.1 * share  # type: ignore
            move = 0.01 if average[i] < 0.3 else -0.01  # type: ignore[operator]
            lambdas[i] = min(max(math.exp(math.log(lambdas[i]) + move), 0.01), 1.0)
    assert lambdas[0] > 0.3 and lambdas[1] != pytest.approx(0.1)


def test_trunk_ratio_starts_and_stays_within_its_bounds() -> None:
    rule = TrunkRatio(2, rate=1.0, every_n_steps=1)
    assert rule.factors([1.0, 3.0, 0.001], at(0)) == [1.0, 1.0, 0.01]
    for step in range(9):
        feed(rule, step, LOSSES[0], gradients=vectors([1.0], [0.0], [1e6]))
    assert rule.factors(BASE, at(9)) == [1.0, 1.0, 0.01]
    # The only effect of the schedule is to switch a depth off.
    assert rule.factors([1.0, 0.2, 0.0], at(9)) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("zero", ["losses", "main loss", "gradients"])
@pytest.mark.parametrize("make", [DWA, GradNorm, TrunkRatio])
def test_steps_without_losses_or_gradients_leave_defined_weights(make: Any, zero: str) -> None:
    rule = make(2, **({"window_steps": 1} if make is DWA else {"every_n_steps": 1}))
    empty = {"losses": [0.0] * 3, "main loss": [0.0, *LOSSES[0][1:]]}.get(zero, LOSSES[0])
    sizes = [[0.0], [0.0], [0.0]] if zero == "gradients" else [[1.0], [0.5], [2.0]]
    for first in (True, False):  # before and after other steps
        for losses in (empty, *LOSSES) if first else (*LOSSES, empty, *LOSSES[:2]):
            gradients = vectors(*(sizes if losses is empty else [[1.0], [0.5], [2.0]]))
            feed(rule, 0, losses, gradients=None if make is DWA else gradients)
            factors = rule.factors(BASE, at(1))
            assert all(map(math.isfinite, factors)) and min(factors) > 0, factors
    assert factors != BASE


def test_trunk_ratio_is_frozen_in_the_last_twentieth_of_a_run() -> None:
    rule = TrunkRatio(1, every_n_steps=1)
    measured = [rule.measures_at(at(step, 200)) for step in range(200)]
    assert measured == [True] * 190 + [False] * 10
    later = TrunkRatio(1, every_n_steps=1, frozen=0.18)  # 1 - 0.18 is one ulp more than 0.82
    assert [later.rests_at(at(step, 100)) for step in (81, 82)] == [False, True]
    slow = TrunkRatio(1, every_n_steps=10)
    assert [s for s in range(200) if slow.measures_at(at(s, 200))] == list(range(9, 190, 10))
    feed(rule, 0, [5.0, 5.0], lambdas=[1.0, 0.3], gradients=vectors([1.0], [0.1]))
    moved = rule.factors([1.0, 0.3], at(1))
    assert moved[1] > 0.3
    feed(rule, 195, [5.0, 5.0], lambdas=[1.0, 0.3])
    assert rule.factors([1.0, 0.3], at(196)) == moved


def test_random_weights_are_a_softmax_of_normals_with_mean_1() -> None:
    rule = RandomWeights(2, seed=5)
    draws = real([rule.factors([1.0, 1.0, 1.0], at(step)) for step in range(3000)])
    torch.testing.assert_close(draws.sum(1), torch.full((3000,), 3.0).double())
    # log w_i - log w_j = z_i - z_j is N(0, 2).
    difference = (draws[:, 0] / draws[:, 1]).log()
    assert abs(float(difference.mean())) < 0.11 and abs(float(difference.std()) - 2**0.5) < 0.08
    assert abs(float(draws.mean(0)[2]) - 1) < 0.06
    assert rule.factors(BASE, at(7)) == RandomWeights(2, seed=5).factors(BASE, at(7))
    assert rule.factors(BASE, at(7)) != RandomWeights(2, seed=6).factors(BASE, at(7))
    assert rule.factors([1.0, 0.0, 0.0], at(7)) == [1.0, 0.0, 0.0]


def test_sampled_depths_trains_one_depth_with_a_larger_weight() -> None:
    rule = SampledDepths(2, seed=1, probabilities=[3.0, 1.0])
    draws = [rule.factors(BASE, at(step)) for step in range(4000)]
    assert Counter(sum(f != 0 for f in draw) for draw in draws) == {2: 4000}
    assert {draw[1] for draw in draws} == {0.0, 0.3 / 0.75}
    assert {draw[2] for draw in draws} == {0.0, 0.1 / 0.25}
    share = sum(draw[1] != 0 for draw in draws) / 4000
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)
    # If the schedule leaves one depth, it is trained in every step, at its own weight.
    assert rule.factors([1.0, 0.0, 0.1], at(0)) == [1.0, 0.0, 0.1]
    assert rule.factors([1.0, 0.0, 0.0], at(0)) == [1.0, 0.0, 0.0]
    assert rule.skips and not SampledDepths(1, seed=1).skips


def test_sampled_depths_draws_by_the_ratio_of_losses() -> None:
    rule = SampledDepths(2, seed=1, probabilities="loss_ratio")
    assert rule.chances(BASE).tolist() == [0.0, 0.5, 0.5]
    first: dict[int, float] = {}
    mean: dict[int, float] = {}
    for step in range(30):
        losses = [5.0, 8.0 / (1 + step), 8.0 - 0.01 * step]
        drawn = next(k for k in (1, 2) if rule.factors(BASE, at(step))[k])
        feed(rule, step, losses)
        first.setdefault(drawn, losses[drawn])
        mean[drawn] = 0.9 * mean[drawn] + 0.1 * losses[drawn] if drawn in mean else losses[drawn]
        ratio = {k: mean[k] / first[k] if k in mean else 1.0 for k in (1, 2)}
        expected = [0.0, *(ratio[k] / sum(ratio.values()) for k in (1, 2))]
        assert rule.chances(BASE).tolist() == pytest.approx(expected, rel=1e-6)
    assert rule.chances(BASE)[2] > 0.6


RULES: dict[str, Any] = {
    "dwa": lambda: DWA(2, window_steps=1),
    "uncertainty": lambda: Uncertainty(2),
    "gradnorm": lambda: GradNorm(2),
    "cosine_gate": lambda: CosineGate(2),
    "trunk_ratio": lambda: TrunkRatio(2, every_n_steps=1),
    "random": lambda: RandomWeights(2, seed=3),
    "sampled_depths": lambda: SampledDepths(2, seed=3, probabilities="loss_ratio"),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_with_a_stored_state_continues_as_before(name: str) -> None:
    def run(rule: Balance, steps: range) -> list[Any]:
        optimizer = torch.optim.AdamW(rule.parameters() or [torch.nn.Parameter(torch.zeros(1))])
        results: list[Any] = []
        for step in steps:
            sizes = ([1.0, 0.1 * step], [-0.5, 0.3], [0.2, 0.0])
            gradients = vectors(*sizes) if rule.scope and rule.measures_at(at(step)) else None
            results.append(rule.factors(BASE, at(step)))
            results.append(feed(rule, step, LOSSES[step], gradients=gradients))
            optimizer.step()
        return results

    rule, loaded = RULES[name](), RULES[name]()
    assert rule.name == name
    run(rule, range(3))
    require_plain(rule.state_dict())
    loaded.load_state_dict(rule.state_dict())
    if name == "uncertainty":  # its state lacks the optimizer's moments
        assert loaded.factors(BASE, at(3)) == rule.factors(BASE, at(3))
    else:
        assert run(loaded, range(3, 5)) == run(rule, range(3, 5))

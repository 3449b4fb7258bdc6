"""Lambda schedules: points computed by hand, properties, and their YAML files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mtp_lightning.command_line.conf_comments import PARTS
from mtp_lightning.objective.schedule import curriculum, published
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import INTERPOLATIONS, Piecewise

CONF = Path(__file__).parents[2] / "conf"
PRESETS = sorted(
    path.stem for path in (CONF / "lambda_schedule").glob("*.yaml") if path.stem not in PARTS
)


def at(fraction: float, *, max_steps: int = 10_000) -> Progress:
    return Progress(step=round(fraction * max_steps), max_steps=max_steps, tokens=0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (published.constant(2, 0.3), {0: [0.15, 0.15], 0.5: [0.15, 0.15], 1: [0.15, 0.15]}),
        (published.constant(2, [0.3, 0.1]), {0: [0.3, 0.1], 1: [0.3, 0.1]}),
        (published.deepseek_v3(1, 0.3), {0: [0.3], 0.6756: [0.3], 0.6757: [0.1], 1: [0.1]}),
        (published.deepseek_v3(2, [0.3, 0.6]), {0: [0.3, 0.6], 0.7: [0.1, 0.2]}),
        (published.linear_decay(1, 0.3), {0: [0.3], 0.5: [0.2], 0.75: [0.15], 1: [0.1]}),
        (published.geometric(2, 1.0), {0: [0.625, 0.375], 1: [0.625, 0.375]}),
        (published.geometric(3, 0.5, beta=1.0), {0: [1 / 6] * 3}),
        (
            curriculum.forward_curriculum(2, 0.4),
            {
                0: [0, 0],
                0.33: [0, 0],
                0.34: [0.2, 0],
                0.66: [0.2, 0],
                0.67: [0.2, 0.2],
                1: [0.2, 0.2],
            },
        ),
        (
            curriculum.reverse_curriculum(2, [0.4, 0.1]),
            {0: [0.4, 0.1], 0.33: [0.4, 0.1], 0.34: [0.4, 0], 0.67: [0, 0], 1: [0, 0]},
        ),
        (
            published.modded_nanogpt(2, 0.3),
            {0: [0.5, 0.25], 1 / 6: [0.5, 0.125], 0.5: [0.25, 0], 0.67: [0, 0], 1: [0, 0]},
        ),
        (
            Piecewise(2, 0.5, {0: [1, 2], 0.5: 1, 1: 0}, interpolation="cosine"),
            {0: [0.5, 1.0], 0.25: [0.375, 0.625], 0.5: [0.25, 0.25], 1: [0, 0]},
        ),
        (
            Piecewise(1, 1.0, {0: 1, 1: 0}, interpolation="cosine"),
            {0.25: [0.5 + math.sqrt(0.5) / 2]},
        ),
        (
            Piecewise(2, 0.3, {0.2: 1, 0.4: [0, 1]}, interpolation="step"),
            {0: [0.15] * 2, 1: [0, 0.3]},
        ),
        (published.constant(0, 0.3), {0: [], 1: []}),
        (Piecewise(2, [0.3, 0.1], {0: [2, 3]}), {0: [0.6, 0.3]}),
    ],
)
def test_weights_are_those_computed_by_hand(
    schedule: Piecewise, expected: dict[float, list[float]]
) -> None:
    for fraction, weights in expected.items():
        lambdas = schedule.lambdas(at(fraction, max_steps=600_000))
        assert lambdas == pytest.approx(weights, abs=1e-12), fraction
        assert [w == 0.0 for w in lambdas] == [w == 0 for w in weights], "zeros are exact"


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_positions_can_be_steps_or_tokens(unit: str) -> None:
    def weights(amount: int) -> list[float]:
        where = {"steps": Progress(amount, 10**9), "tokens": Progress(0, 10**9, amount)}
        return Piecewise(1, 1.0, {0: 1, 100: 0}, unit=unit).lambdas(where[unit])

    assert [weights(a)[0] for a in (0, 25, 100, 1000)] == [1.0, 0.75, 0.0, 0.0]
    v3 = published.deepseek_v3(1, 0.3, unit=unit, length=14.8)
    before = {"steps": Progress(9, 15), "tokens": Progress(0, 15, 9)}[unit]
    after = {"steps": Progress(10, 15), "tokens": Progress(0, 15, 10)}[unit]
    assert (v3.lambdas(before)[0], v3.lambdas(after)[0]) == (0.3, pytest.approx(0.1))


def test_stages_change_at_whole_steps() -> None:
    for schedule in (
        curriculum.forward_curriculum(2, 1.0),
        curriculum.forward_curriculum(2, 1.0, unit="steps", length=300),
    ):
        lambdas = [schedule.lambdas(Progress(step, 300)) for step in (99, 100, 199, 200)]
        assert lambdas == [[0, 0], [0.5, 0], [0.5, 0], [0.5, 0.5]]
    # 9 / 11 * 77 is one ulp above 63.
    deep = curriculum.forward_curriculum(10, 1.0, unit="steps", length=77)
    assert [deep.lambdas(Progress(step, 77)).count(0) for step in (62, 63)] == [2, 1]


def test_depth_ever_skipped_says_whether_a_weight_is_zero_at_some_step() -> None:
    assert not published.constant(2, 0.3).depth_ever_skipped
    assert not published.constant(0, 0.3).depth_ever_skipped
    assert published.constant(2, 0.0).depth_ever_skipped
    assert published.constant(2, [0.3, 0]).depth_ever_skipped
    assert curriculum.forward_curriculum(1, 0.3).depth_ever_skipped
    assert published.modded_nanogpt(2, 0.3).depth_ever_skipped


knot_lists = st.dictionaries(
    st.floats(0, 1), st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=5
)


@settings(max_examples=40)
@given(knot_lists, st.sampled_from(INTERPOLATIONS), st.integers(0, 1000))
# 0.3 + (0.9 - 0.3) is above 0.9 in floating point.
@example({0.0: [0.3, 0.4, 0.8], math.nextafter(0.5, 1): [0.9, 0.1, 0.2]}, "cosine", 500)
def test_weights_are_between_those_of_the_nearest_knots(
    knots, interpolation: str, step: int
) -> None:
    schedule = Piecewise(3, 1.0, knots, interpolation=interpolation)
    progress = Progress(step, 1000)
    weights = schedule.lambdas(progress)
    left = [p for p in schedule.positions if p <= progress.fraction] or [schedule.positions[0]]
    right = [p for p in schedule.positions if p >= progress.fraction] or [schedule.positions[-1]]
    for k, weight in enumerate(weights):
        ends = (knots[left[-1]][k], knots[right[0]][k])
        assert min(ends) <= weight <= max(ends)
        if ends[0] == ends[1]:
            assert weight == ends[0]


def composed(name: str, *overrides: str, depth: int = 2, mtp_lambda: str = "0.3"):
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose(
            overrides=[
                f"+lambda_schedule={name}",
                f"+mtp.depth={depth}",
                f"+mtp_lambda={mtp_lambda}",
                *overrides,
            ]
        )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_from_its_yaml_and_takes_every_unit(name: str) -> None:
    cfg = composed(name, mtp_lambda="[0.3,0.1]").lambda_schedule
    by_fraction = instantiate(cfg)
    assert isinstance(by_fraction, Piecewise) and len(by_fraction.lambdas(at(0.5))) == 2
    with pytest.raises(Exception, match="unknown_key"):
        instantiate(cfg, unknown_key=1)
    for unit in () if name == "knots" else ("steps", "tokens"):
        by_unit = instantiate(cfg, unit=unit, length=1000)
        for amount in range(0, 1200, 7):
            progress = Progress(amount, 1000, amount)
            expected = by_fraction.lambdas(progress)
            assert by_unit.lambdas(progress) == pytest.approx(expected, abs=1e-6)


def test_knots_can_be_given_on_the_command_line() -> None:
    cfg = composed("knots", "lambda_schedule.knots={0: [0.3,0.1], 0.5: 0.1}", mtp_lambda="1")
    assert OmegaConf.to_container(cfg.lambda_schedule.knots) == {0: [0.3, 0.1], 0.5: 0.1}
    schedule = instantiate(cfg.lambda_schedule)
    assert schedule.lambdas(at(0)) == [0.3, 0.1]
    assert schedule.lambdas(at(0.5)) == [0.05, 0.05]
    assert schedule.lambdas(at(0.25)) == pytest.approx([0.175, 0.075])
    # They replace the default knots.
    cfg = composed("knots", "lambda_schedule.knots={0.25: 0.5}", mtp_lambda="1", depth=1)
    assert instantiate(cfg.lambda_schedule).lambdas(at(0)) == [0.5]


@pytest.mark.parametrize("max_steps", [0, -1])  # -1 is that of a Trainer with max_epochs alone
def test_progress_without_the_steps_of_the_run_is_refused(max_steps: int) -> None:
    with pytest.raises(ValueError, match=f"max_steps={max_steps} must be the optimizer steps"):
        Progress(step=0, max_steps=max_steps)

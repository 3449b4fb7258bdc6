"""The learning-rate multiplier at hand-computed points and for random settings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_lightning.optim.lr_schedule import KINDS, LRSchedule


def points(schedule: LRSchedule, max_steps: int, *steps: int) -> list[float]:
    return [schedule(step, max_steps) for step in steps]


def test_cosine() -> None:
    schedule = LRSchedule("cosine", warmup_steps=10, min_ratio=0.1)
    got = points(schedule, 110, 0, 4, 9, 10, 60, 110, 500)
    assert got == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
    assert schedule(35, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 0.5**0.5))


def test_wsd() -> None:
    schedule = LRSchedule("wsd", warmup_fraction=0.1, decay_fraction=0.2, min_ratio=0.0)
    got = points(schedule, 100, 0, 9, 10, 79, 80, 90, 95, 100)
    assert got == pytest.approx([0.1, 1, 1, 1, 1, 0.5, 0.25, 0])


def test_constant_needs_no_length() -> None:
    schedule = LRSchedule("constant", warmup_steps=4)
    assert points(schedule, -1, 0, 3, 4, 10**6) == [0.25, 1, 1, 1]


def test_no_warmup_starts_at_one() -> None:
    assert LRSchedule("cosine")(0, 100) == 1.0


def test_a_warmup_longer_than_the_run() -> None:
    got = points(LRSchedule("wsd", warmup_steps=1000, decay_fraction=0.5), 10, 0, 9)
    assert got == pytest.approx([0.001, 0.01])


@given(
    st.sampled_from(KINDS),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 500),
    st.integers(0, 600),
)
def test_in_the_unit_interval_and_rises_then_falls(
    kind, warm, decay, ratio, max_steps, step
) -> None:
    schedule = LRSchedule(kind, warmup_fraction=warm, decay_fraction=decay, min_ratio=ratio)
    values = [schedule(s, max_steps) for s in range(step, step + 3)]
    assert all(0 <= value <= 1 for value in values)
    assert values[1] >= min(values[0], values[2]) - 1e-12, "one hill"


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "triangle"},
        {"warmup_steps": 5, "warmup_fraction": 0.1},
        {"warmup_steps": -1},
        {"warmup_steps": 0.1},
        {"warmup_fraction": 1.5},
        {"decay_fraction": -0.1},
        {"min_ratio": float("nan")},
        {"min_ratio": "0.1"},
    ],
)
def test_mistakes_are_named(arguments: dict) -> None:
    with pytest.raises(ValueError) as error:
        LRSchedule(**arguments)
    assert all(str(value) in str(error.value) for value in arguments.values())


def test_a_run_without_length() -> None:
    with pytest.raises(ValueError, match="max_steps"):
        LRSchedule("cosine")(0, -1)

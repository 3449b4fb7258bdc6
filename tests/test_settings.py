"""Settings are refused with the key, the value and what it must be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mtp_lightning.settings import (
    is_number,
    is_whole,
    require,
    require_bool,
    require_choice,
    require_number,
    require_whole,
)

NOT_NUMBERS = [True, False, None, "3", [3], math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_values_that_are_not_numbers_are_refused(value: Any) -> None:
    assert not is_number(value) and not is_whole(value)
    for check in (require_number, lambda k, v: require_whole(k, v, least=0)):
        with pytest.raises(ValueError, match="^data.seq_len must be a "):
            check("data.seq_len", value)


def test_numpys_integers_are_whole_but_are_not_accepted() -> None:
    assert is_whole(np.int64(3)) and is_whole(np.uint8(0))
    assert not is_whole(np.float64(3)) and not is_whole(np.True_) and not is_whole(np.array([3]))
    with pytest.raises(ValueError, match=r"^k must be a whole number of at least 1, not np.int64"):
        require_whole("k", np.int64(3), least=1)


def test_numbers_and_whole_numbers_are_accepted() -> None:
    assert is_number(3) and is_number(-0.5) and is_whole(-3) and not is_whole(3.0)
    assert require_whole("k", 1, least=1) == 1
    assert require_number("k", 0.25, least=0, below=1) == 0.25


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        ({}, [-1e9, 0], ["x"], "a number, not 'x'"),
        ({"least": 0}, [0, 7], [-1], "a number of at least 0, not -1"),
        ({"above": 0}, [1e-9], [0], "a number above 0, not 0"),
        ({"most": 2}, [2], [2.5], "a number of at most 2, not 2.5"),
        ({"below": 2}, [1.9], [2], "a number below 2, not 2"),
        ({"least": 0, "below": 1}, [0, 0.9], [1], r"a number in \[0, 1\), not 1"),
        ({"least": 0, "most": 1}, [0, 1], [1.1], r"a number in \[0, 1\], not 1.1"),
        ({"above": 0, "most": 1}, [1], [0], r"a number in \(0, 1\], not 0"),
    ],
)
def test_numbers_out_of_bounds_are_refused_with_the_bounds(bounds, inside, outside, words):
    for value in inside:
        assert require_number("key", value, **bounds) == value
    for value in outside:
        with pytest.raises(ValueError, match=f"^key must be {words}.$"):
            require_number("key", value, **bounds)


def test_numbers_that_overflow_in_pytorch_are_refused_as_too_large() -> None:
    words = r"^key must be a (whole )?number, not .*, which is too large.$"
    for check, value in (
        (require_whole, 10**30),
        (require_number, 10**30),
        (require_number, 1e200),
    ):
        with pytest.raises(ValueError, match=words):
            check("key", value)
    assert require_number("key", 1e30) == 1e30 and not is_number(-1e200)
    with pytest.raises(ValueError, match=r"^key must be true or false, not 1e\+200.$"):
        require_bool("key", 1e200)


def test_wrong_whole_numbers_choices_and_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="^data.seq_len must be a whole number of at least 1, not"):
        require_whole("data.seq_len", 0, least=1)
    assert require_choice("mode", "min", ("min", "max")) == "min"
    with pytest.raises(ValueError, match="^mode=low is unknown: choose one of min, max.$"):
        require_choice("mode", "low", ("min", "max"))
    require(True, "key", 1, "anything")
    with pytest.raises(ValueError, match="^key must be two numbers, not \\[1\\].$"):
        require(False, "key", [1], "two numbers")

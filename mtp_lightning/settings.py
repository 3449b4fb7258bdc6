"""Checks of settings. Each refuses a value with one sentence that names the key and the remedy.

``True`` and ``False`` do not count as numbers here, although Python treats them as such. Neither do
NaN and infinity, which make sense for no setting.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeGuard

from mtp_lightning.errors import UserError


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a setting is a number that fp32 can hold; as a setting, a whole one has 64 bits."""
    return (is_whole(value) or isinstance(value, float)) and abs(value) < 1 << 127


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, of Python or NumPy."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def require(condition: bool, key: str, value: Any, wanted: str, note: str = "") -> None:
    """Refuse the value of a dotted key by a :class:`UserError` unless a condition holds. ``wanted``
    are the allowed values, in words that follow "must be"; a ``note`` on the value ends it."""
    if not condition:
        # Python refuses to print a number of thousands of digits.
        bits = int(value).bit_length() if is_whole(value) else 0
        shown = f"a number of {bits} bits" if bits > 1023 else repr(value)
        raise UserError(f"{key} must be {wanted}, not {shown}{note}.")


def require_whole(
    key: str, value: Any, *, least: int | None = None, most: int | None = None
) -> int:
    """Return the value, which must be a Python int (checkpoints store no others) within bounds;
    otherwise raise a :class:`UserError`."""
    whole = isinstance(value, int) and is_whole(value) and abs(value) < 1 << 63
    fits = whole and (least is None or value >= least) and (most is None or value <= most)
    require(fits, key, value, "a whole number" + _bounds(least, None, most, None), _size(value))
    return value


def require_number(
    key: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """Return the value, which must be a number within bounds; otherwise raise a :class:`UserError`.
    ``least`` and ``most`` are inclusive, ``above`` and ``below`` exclusive; there is at most one
    lower and one upper bound."""
    fits = (
        is_number(value)
        and (isinstance(value, float) or abs(value) < 1 << 63)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )
    require(fits, key, value, "a number" + _bounds(least, above, most, below), _size(value))
    return value


def require_bool(key: str, value: Any) -> bool:
    """Return the value, which must be true or false; otherwise raise a :class:`UserError`."""
    require(isinstance(value, bool), key, value, "true or false")
    return value


def require_choice(key: str, value: Any, choices: Sequence[str]) -> str:
    """Return the value, which must be one of ``choices``; otherwise raise a :class:`UserError`."""
    if value not in choices:
        raise UserError(f"{key}={value} is unknown: choose one of {', '.join(choices)}.")
    return value


def _size(value: Any) -> str:
    return ", which is too large" if isinstance(value, int | float) and value >= 1 << 63 else ""


def _bounds(
    least: float | None, above: float | None, most: float | None, below: float | None
) -> str:
    low = above if least is None else least
    high = below if most is None else most
    if low is not None and high is not None:
        return f" in {'(' if least is None else '['}{low}, {high}{')' if most is None else ']'}"
    words = {" of at least": least, " above": above, " of at most": most, " below": below}
    return "".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)

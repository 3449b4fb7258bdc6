"""The fields of a body: their types, those that change nothing here, and those that are refused.

A field that would change the text and that this server has no means for is refused rather than
ignored; null is a field that was not given.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.serving.refusal import Refusal
from mtp_lightning.settings import is_number, is_whole

# What they say changes no text.
IGNORED = frozenset(
    {
        *("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention"),
        *("safety_identifier", "service_tier", "store", "user"),
    }
)
# Accepted with the one value that asks for nothing.
NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "modalities": ["text"],
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
}
_SHOWN = 60  # characters of a client's value in a message
_MOST_STOPS, _LONGEST_STOP = 16, 256


def parse(body: bytes) -> dict[str, Any]:
    """A body's JSON object.

    Raises:
        Refusal: it is none, or not UTF-8, or has numbers that JSON has not.
    """
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError:
        raise Refusal("The body is not UTF-8: send JSON in UTF-8.") from None
    except (ValueError, RecursionError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refusal(f"The body is not JSON: {told}.") from None
    if not isinstance(content, dict):
        raise Refusal(f"The body must be a JSON object, not {shown(content)}.")
    return {name: value for name, value in content.items() if value is not None}


def _no_number(name: str) -> None:
    raise UserError(f"{name} is no number of JSON")


def check_known(fields: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse what would be ignored though it changes the text.

    Raises:
        Refusal: a field that is unknown, or that asks for what cannot be done here.
    """
    for name, value in fields.items():
        if name in known or name in IGNORED:
            continue
        if name not in NEUTRAL:
            raise Refusal(f"The field {shown(name)} is not known here: leave it out.")
        if not _same(value, NEUTRAL[name]):
            only = json.dumps(NEUTRAL[name])
            raise Refusal(f"{name}={shown(value)} is not supported, only {only}.", param=name)


def _same(value: Any, neutral: Any) -> bool:
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def whole(
    fields: Mapping[str, Any], name: str, *, least: int, most: int, default: int | None = None
) -> int | None:
    """A whole number, or the default where it was not given.

    Raises:
        Refusal: something else, or out of bounds.
    """
    value = fields.get(name, default)
    if name in fields and not (is_whole(value) and least <= value <= most):
        wanted = f"a whole number from {least} to {most}"
        raise Refusal(f"{name} must be {wanted}, not {shown(value)}.", param=name)
    return value


def number(
    fields: Mapping[str, Any], name: str, *, least: float, most: float, default: float
) -> float:
    """A number, or the default where it was not given.

    Raises:
        Refusal: something else, or out of bounds.
    """
    value = fields.get(name, default)
    if not (is_number(value) and least <= value <= most):
        wanted = f"a number from {least} to {most}"
        raise Refusal(f"{name} must be {wanted}, not {shown(value)}.", param=name)
    return float(value)


def flag(fields: Mapping[str, Any], name: str) -> bool:
    """True or false; false where it was not given.

    Raises:
        Refusal: something else.
    """
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise Refusal(f"{name} must be true or false, not {shown(value)}.", param=name)
    return value


def text(value: Any, name: str) -> str:
    """A string that has an encoding.

    Raises:
        Refusal: something else, or half a surrogate pair.
    """
    if not isinstance(value, str):
        raise Refusal(f"{name} must be a string, not {shown(value)}.", param=name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal(f"{name} holds half of a surrogate pair, no character.", param=name) from None
    return value


def stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The strings that end a text.

    Raises:
        Refusal: something else, an empty one, too many or too long ones.
    """
    value = fields.get("stop", [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise Refusal(f"stop must be a string or a list, not {shown(value)}.", param="stop")
    if len(values) > _MOST_STOPS:
        raise Refusal(
            f"stop holds {len(values)} strings: give at most {_MOST_STOPS}.", param="stop"
        )
    found = tuple(text(string, "stop") for string in values)
    for string in found:
        if not 1 <= len(string) <= _LONGEST_STOP:
            told = f"a string of 1 to {_LONGEST_STOP} characters, not {shown(string)}"
            raise Refusal(f"stop must be {told}.", param="stop")
    return found


def shown(value: Any) -> str:
    """A client's value, as much of it as belongs into a sentence."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    if is_whole(value) and abs(value) >= 10**_SHOWN:
        return "a number of more digits than fit here"
    told = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()
    return told if len(told) <= _SHOWN else f"{told[:_SHOWN]}.."

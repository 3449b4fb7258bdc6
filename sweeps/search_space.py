"""Ranges of a search, as typed: ``optimizer.lr='interval(1e-4,1e-2,log)'``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from mtp_lightning.errors import UserError
from mtp_lightning.run.config import key_of
from sweeps import digits
from sweeps.compose import prepare_values

if TYPE_CHECKING:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

_FORM = re.compile(r"(interval|int)\(([^(),]+),([^(),]+)(?:,(\s*log\s*))?\)")


Range = Union["FloatDistribution", "IntDistribution", "CategoricalDistribution"]
Space = dict[str, Range]


def examples(domain: Range) -> Sequence[Any]:
    """Values to compose a config with, representing all others: the choices, or both bounds."""
    from optuna.distributions import CategoricalDistribution

    if isinstance(domain, CategoricalDistribution):
        return domain.choices
    return [domain.low, domain.high]


def shown(domain: Range) -> str:
    """A range as it is typed; studies store this text."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(domain, CategoricalDistribution):
        return f"choice({','.join(map(str, domain.choices))})"
    kind = "int" if isinstance(domain, IntDistribution) else "interval"
    return f"{kind}({digits(domain.low)},{digits(domain.high)}{',log' * domain.log})"


def parse(arguments: Sequence[str]) -> tuple[Space, list[str]]:
    """Splits overrides into the range of each key that is searched, and the fixed overrides.

    ``interval(a,b)`` and ``int(a,b)`` are ranges, including their bounds, with ``,log`` on a log
    scale; ``choice(a,b)`` and ``a,b`` are choices; all others are fixed.

    Raises:
        UserError: for an argument that is none of these, or nothing to search.
    """
    from optuna.distributions import CategoricalDistribution

    space: Space = {}
    fixed: list[str] = []
    searched: set[str] = set()
    for argument in arguments:
        key, _, text = argument.partition("=")
        match = _FORM.fullmatch(text.strip().strip("'\""))
        try:
            override = None if match else OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise UserError(
                f"{argument} is neither an override nor a range like interval(1e-4,1e-2,log), "
                "int(1,4) or a,b."
            ) from error
        if override is not None and not override.is_sweep_override():
            fixed.append(argument)
            continue
        if key_of(argument) in searched:
            raise UserError(f"{argument} gives {key} a second range: leave one out.")
        searched.add(key_of(argument))
        if match is not None:
            space[key] = _interval(argument, match)
        elif override is not None and override.is_discrete_sweep():
            prepare_values(override)
            space[key] = CategoricalDistribution(tuple(map(str, override.sweep_string_iterator())))
        else:
            raise UserError(f"{argument}: write it as {key}=interval(a,b), or with ,log.")
    if not space:
        raise UserError(
            "There is nothing to search: give a range, as optimizer.lr='interval(1e-4,1e-2,log)'."
        )
    if repeated := [argument for argument in fixed if key_of(argument) in searched]:
        raise UserError(f"{repeated[0]} fixes a key that is searched: give its range or its value.")
    return space, fixed


def _interval(argument: str, match: re.Match[str]) -> Range:
    from optuna.distributions import FloatDistribution, IntDistribution

    kind, first, last, log = match.groups()
    to_number = int if kind == "int" else float
    try:
        low, high = to_number(first), to_number(last)
    except ValueError:
        numbers = "whole numbers" if kind == "int" else "numbers"
        raise UserError(f"{argument}: the bounds of {kind}() must be {numbers}.") from None
    if not -math.inf < low < high < math.inf:
        raise UserError(f"{argument}: both bounds must be finite, and the lower one come first.")
    if log and low <= 0:
        raise UserError(f"{argument}: with log the lower bound must be above 0.")
    distribution = IntDistribution if kind == "int" else FloatDistribution
    return distribution(low, high, log=log is not None)  # type: ignore[arg-type]

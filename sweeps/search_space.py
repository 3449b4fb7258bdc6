"""Ranges of a search, as typed: ``optimizer.lr='interval(1e-4,1e-2,log)'``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from mtp_lightning.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial

_FORM = re.compile(r"(interval|int)\(([^(),]+),([^(),]+)(?:,(\s*log\s*))?\)")


@dataclass(frozen=True)
class Interval:
    """All numbers from ``low`` to ``high``, integers if ``whole``, on a linear or log scale."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Trial, key: str) -> str:
        """The sampler's choice, as text."""
        if self.whole:
            return str(trial.suggest_int(key, int(self.low), int(self.high), log=self.log))
        return repr(trial.suggest_float(key, self.low, self.high, log=self.log))

    @property
    def examples(self) -> tuple[str, ...]:
        """Values to compose a config with, representing all others."""
        return (repr(int(self.low) if self.whole else self.low),)

    def __str__(self) -> str:
        numbers = f"{self.low:g},{self.high:g}" + (",log" if self.log else "")
        return f"{'int' if self.whole else 'interval'}({numbers})"


@dataclass(frozen=True)
class Choice:
    """One of several values, as text."""

    values: tuple[str, ...]

    def suggest(self, trial: Trial, key: str) -> str:
        """The sampler's choice."""
        return str(trial.suggest_categorical(key, self.values))

    @property
    def examples(self) -> tuple[str, ...]:
        """All values."""
        return self.values

    def __str__(self) -> str:
        return f"choice({','.join(self.values)})"


Space = dict[str, Interval | Choice]


def parse(arguments: Sequence[str]) -> tuple[Space, list[str]]:
    """Splits overrides into the range of each key that is searched, and the fixed overrides.

    ``interval(a,b)`` and ``int(a,b)`` are ranges, including their bounds, with ``,log`` on a log
    scale; ``choice(a,b)`` and ``a,b`` are choices; all others are fixed.

    Raises:
        UserError: for an argument that is none of these, or nothing to search.
    """
    space: Space = {}
    fixed: list[str] = []
    for argument in arguments:
        key, _, text = argument.partition("=")
        form = _FORM.fullmatch(text.strip().strip("'\""))
        if form is not None:
            space[key] = _interval(argument, form)
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise UserError(
                f"{argument} is neither an override nor a range like interval(1e-4,1e-2,log), "
                "int(1,4) or choice(a,b)."
            ) from error
        if not override.is_sweep_override():
            fixed.append(argument)
        elif override.is_discrete_sweep():
            space[key] = Choice(tuple(map(str, override.sweep_string_iterator())))
        else:
            raise UserError(f"{argument}: write it as {key}=interval(a,b), or with ,log.")
    if not space:
        raise UserError(
            "There is nothing to search: give a range, as optimizer.lr='interval(1e-4,1e-2,log)'."
        )
    return space, fixed


def _interval(argument: str, form: re.Match[str]) -> Interval:
    kind, low, high, log = form.groups()
    try:
        number = int if kind == "int" else float
        interval = Interval(number(low), number(high), log is not None, kind == "int")
    except ValueError:
        raise UserError(f"{argument}: the bounds of {kind}() must be numbers.") from None
    if not interval.low < interval.high:
        raise UserError(f"{argument}: the lower bound must come first.")
    if interval.log and interval.low <= 0:
        raise UserError(f"{argument}: with log the lower bound must be above 0.")
    return interval

"""Checks the jobs of a stored plan: they may set values, but may not name code, since anybody may
have written the plan.

A plan names what its jobs compute. A job may use other classes than this project's, use the
network, or write outside its own folder only if the user allows it by name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from mtp_lightning.command_line.quote import INPUTS
from mtp_lightning.errors import UserError
from mtp_lightning.paths import CONF
from mtp_lightning.run.config import PLACES, lies_in
from mtp_lightning.stored import (
    WRITTEN,
    is_cache,
    require_network,
    require_target,
    targets_of,
    values,
)
from sweeps.plan import PlannedJob, Recipe

_KEY = re.compile(r"\w+([./]\w+)*")
_CHOICE = re.compile(r"[\w-]+(\.[\w-]+)*(/[\w-]+(\.[\w-]+)*)*")
# The value of another key of the same config; any other interpolation would be a lookup.
_OTHER_KEY = re.compile(r"\$\{\.*[\w.]+\}")
_HOW = "--allow {}"


def require_harmless(
    sweep: Path, job: PlannedJob, recipe: Recipe, *, allow: Collection[str]
) -> None:
    """Refuses a job that does more than train in its own folder with this platform's own code, and
    with the packages, folders of configs, URLs and services that the user allowed. ``sweep`` is the
    folder of the plan.

    Raises:
        UserError: naming what was refused, and the remedy.
    """
    if (sweep / job.folder).is_symlink():
        raise UserError(f"{sweep / job.folder} is a link: a job writes in its own folder.")
    source, options = f"{sweep}/sweep.json", list(recipe.options)
    while len(options) > 1 and options[0] in ("--config-dir", "--config-name"):
        name, value, *options = options
        if name == "--config-dir" and value not in allow:
            raise UserError(
                f"{source}: its jobs use the configs in {value}, which may name any code. If you "
                f"trust its author, add {_HOW.format(shlex.quote(value))}."
            )
        if name == "--config-name" and not _CHOICE.fullmatch(value):
            raise UserError(f"{source}: --config-name {value} is not the name of a config.")
    for override in options:
        require_plain(override, source=source, allow=allow, housekeeping=("paths.cache_dir",))
    for override in job.overrides:
        require_plain(override, source=source, allow=allow)


def require_plain(
    text: str, *, source: str, allow: Collection[str] = (), housekeeping: Sequence[str] = ()
) -> None:
    """Refuses a stored override that does more than set what a run of this platform computes.

    Args:
        source: where it comes from, for the message.
        allow: packages, folders, URLs and services that the user allowed.
        housekeeping: keys of a run's paths that it may set.

    Raises:
        UserError: with the remedy.
    """
    try:
        if text.startswith("-"):
            raise UserError(f"{text} is refused: a job's settings are overrides, not options.")
        parsed = _parsed(text)
        key, value = parsed.key_or_group, parsed.value()
        dotted = key.replace("/", ".")
        if not _KEY.fullmatch(key) or lies_in(dotted, ["hydra"]):
            raise UserError(f"{text} is refused: a job sets what it computes, nothing of Hydra's.")
        if lies_in(dotted, PLACES) and key not in housekeeping:
            raise UserError(f"{text} is refused: the sweep decides where a job's files go.")
        if "." not in key and key not in INPUTS:
            _choices(text, key, value, allow)
        for name, leaf in values(value, dotted):
            _leaf(text, name, leaf, allow)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: {text} is not an override: {reason}.") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


@cache
def _parsed(text: str) -> Override:
    """An override; parsing is slow, and the arms of claims share many of theirs."""
    return OverridesParser.create().parse_override(text)


def _choices(text: str, group: str, value: Any, allow: Collection[str]) -> None:
    """Checks the options of a group, which Hydra reads as files."""
    for choice in value if isinstance(value, list) else [value]:
        if not isinstance(choice, str):
            continue
        if not _CHOICE.fullmatch(choice) and not _OTHER_KEY.fullmatch(choice):
            raise UserError(f"{text} is refused: {choice!r} is not the name of an option.")
        file = CONF / group / f"{choice.removesuffix('.yaml')}.yaml"
        if file.is_file():
            for target in targets_of(file):
                require_network(target, allow, how=_HOW)


def _leaf(text: str, key: str, value: Any, allow: Collection[str]) -> None:
    last = key.rpartition(".")[2]
    value_text = str(value)
    if "${" in _OTHER_KEY.sub("", value_text) or (last.startswith("_") and "${" in value_text):
        raise UserError(f"{text} is refused: a stored value must not look anything up.")
    if "://" in value_text and value_text not in allow:
        raise UserError(
            f"{text} is refused: a stored value must not use the network. If you trust its "
            f"author, add {_HOW.format(shlex.quote(value_text))}."
        )
    if last == "_target_":
        require_target(value_text, allow, how=_HOW)
    if key.partition(".")[0] == "allow" and value_text not in allow:
        raise UserError(f"{text} is refused: trust it yourself, by --allow {value_text}.")
    if last in WRITTEN and value is not None and value_text not in allow:
        if last == "cache_dir" and is_cache(value_text):
            return
        raise UserError(
            f"{text} is refused: a job writes in its own folder, and token stores where there are "
            f"some already. If it should write there, add {_HOW.format(shlex.quote(value_text))}."
        )

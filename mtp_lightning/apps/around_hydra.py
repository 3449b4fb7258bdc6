"""Hydra's errors in one sentence, with the remedy of this project: it never advises a ``+``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from hydra._internal import utils
from hydra._internal.hydra import Hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mtp_lightning.errors import UserError


@contextmanager
def hydra_as_ours(arguments: list[str]) -> Iterator[None]:
    """Let Hydra raise what it would print, as a user's error of one sentence, and compose once.

    It composes every config twice, the first time to see whether it sets ``hydra.mode``. Only what
    is typed, or a config from elsewhere, can.

    Args:
        arguments: the command line.
    """

    def unreported(func: Any) -> Any:
        return func()

    def unset(*_: Any, **__: Any) -> None:
        return None

    foreign = any(word.startswith(("hydra.mode=", "--config-", "-cd", "-cn")) for word in arguments)
    before = utils.run_and_report, Hydra.get_mode
    utils.run_and_report = unreported
    if not foreign:
        Hydra.get_mode = unset  # type: ignore[method-assign]
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        from mtp_lightning.misspelt import sentence

        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        raise UserError(sentence(error)) from error
    finally:
        utils.run_and_report, Hydra.get_mode = before  # type: ignore[method-assign]


def require_flags(arguments: list[str]) -> None:
    """Refuse a flag that Hydra does not have, in a line."""
    parser = utils.get_args_parser()

    def refuse(message: str) -> NoReturn:
        print(f"error: {message}. (--help)", file=sys.stderr)
        sys.exit(2)

    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(arguments)

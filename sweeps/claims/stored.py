"""How what is stored of a claim is read again: JSON of a known version, or a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mtp_lightning.errors import UserError
from mtp_lightning.stored import read_json

T = TypeVar("T")


def read_stored(
    file: Path, version: int, parse: Callable[[dict[str, Any]], T], *, remedy: str
) -> T | None:
    """What a file holds; None where there is none.

    Args:
        file: with ``version`` among its keys.
        version: the one that is understood.
        parse: from the content to what is wanted.
        remedy: what to do with a file that cannot be read.

    Raises:
        UserError: it is damaged, or of another version.
    """
    if not file.exists():
        return None
    try:
        content = read_json(file)
        if content["version"] != version:
            raise UserError(f"version {content['version']}")
        return parse(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read as version {version} of this file ({error}): {remedy}."
        ) from error

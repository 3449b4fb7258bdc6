"""Finds the Jinja templates of a package."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def environment(package: str, *, html: bool = False) -> Environment:
    """The ``*.jinja`` files of a package; with ``html``, inserted values are escaped for HTML.

    It is cached, since compiling the templates takes longer than filling them.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader(package, ".")
    templates = Environment(loader=loader, autoescape=html, undefined=StrictUndefined)
    templates.trim_blocks = templates.lstrip_blocks = True
    return templates

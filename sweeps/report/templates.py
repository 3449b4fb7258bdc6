"""Renders pages and prose from Jinja templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def environment(package: str, *, html: bool = False) -> Environment:
    """The ``*.jinja`` files of a package; with ``html``, inserted values are escaped for HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader(package, ".")
    made = Environment(loader=loader, autoescape=html, undefined=StrictUndefined)
    made.trim_blocks = made.lstrip_blocks = True
    return made


def sentences(package: str, name: str, **facts: Any) -> list[str]:
    """The lines of a rendered template, one sentence each, without empty lines."""
    made = environment(package)
    made.finalize = lambda value: " ".join(str(value).splitlines())  # a name may have several lines
    text = made.get_template(name).render(**facts)
    return [line.strip() for line in text.splitlines() if line.strip()]

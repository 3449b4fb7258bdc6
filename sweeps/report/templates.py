"""Renders pages and prose from Jinja templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def environment(package: str, *, html: bool = False) -> Environment:
    """The templates of a package.

    Args:
        package: the package with the ``*.jinja`` files.
        html: whether inserted values are escaped for HTML.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(package, "."),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )


def sentences(package: str, name: str, **facts: Any) -> list[str]:
    """The lines of a rendered template, one sentence each, without empty lines."""
    made = environment(package)
    made.finalize = lambda value: " ".join(str(value).splitlines())  # a name may have several lines
    text = made.get_template(name).render(**facts)
    return [line.strip() for line in text.splitlines() if line.strip()]

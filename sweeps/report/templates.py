"""Pages and prose from templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def environment(package: str, *, html: bool = False) -> Environment:
    """Templates of a package's folder.

    Args:
        package: whose ``*.jinja`` they are.
        html: whether what is filled in is escaped for a page.
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
    """What a template of prose says: a sentence a line; lines that say nothing are left out."""
    made = environment(package)
    made.finalize = lambda value: " ".join(str(value).splitlines())  # a name may have several lines
    text = made.get_template(name).render(**facts)
    return [line.strip() for line in text.splitlines() if line.strip()]

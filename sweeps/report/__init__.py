"""Reports a sweep as a page: `python -m sweeps.report FOLDER`.

Data flows through read.py (files -> runs), collect.py and settings.py (runs that differ only in the
seed), compare.py and equivalent.py (differences, gains), figures.py with lines.py (drawn by
chart.py), tables.py and findings.py, to page.py. texts.yaml and the templates have the words. The
report trains nothing and writes nothing into a run's folder.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from mtp_lightning.errors import require_package

if TYPE_CHECKING:
    from jinja2 import Environment


def require_packages(what: str) -> None:
    """Check that the packages of the extra ``report`` are installed, which ``what`` needs.

    Raises:
        UserError: one is missing.
    """
    for name in ("matplotlib", "jinja2", "scipy"):
        require_package(name, what=what, extra="report")


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

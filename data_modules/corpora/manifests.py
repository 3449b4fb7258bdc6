"""What the texts of installed packages held where this project's results come from.

``manifests.json`` has of every package the version and, after cleaning, the number of files, their
bytes and SHA-256. ``make manifests`` writes it anew from this environment.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from data_modules.sources.installed import Package

log = logging.getLogger(__name__)

FILE = Path(__file__).with_name("manifests.json")


@cache
def _manifests() -> dict[str, dict[str, dict[str, Any]]]:
    content: dict[str, dict[str, dict[str, Any]]] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def say_differences(source: str, packages: Sequence[Package]) -> None:
    """Log one line if packages have another version than the manifest says.

    Args:
        source: ``packages`` or ``literature``.
        packages: that are installed; those that the manifest does not know are left out.
    """
    known = _manifests()[source]
    other = [
        f"{package.name} {package.version} (there {known[package.name]['version']})"
        for package in packages
        if package.name in known and package.version != known[package.name]["version"]
    ]
    if other:
        log.warning(
            "data=%s is another text than that of this project's results: %s. Compare runs of this "
            "environment with each other alone.",
            source,
            ", ".join(other),
        )


def write() -> None:
    """Write the manifests of what is installed: ``make manifests``."""
    from data_modules.corpora.literature import LiteratureSource
    from data_modules.corpora.packages import PackagesSource

    sources = (PackagesSource(), LiteratureSource())
    found = {source.name: source.summary()["packages"] for source in sources}
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

"""Contents of the packages whose text this project's results were made with.

``manifests.json`` lists for every package the version and, after cleaning, the number of files,
their bytes and their SHA-256. ``make manifests`` writes it from the packages installed here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_modules.sources.base import Source
from data_modules.sources.installed import Package

log = logging.getLogger(__name__)

FILE = Path(__file__).with_name("manifests.json")


def manifest_of(package: Package, files: Iterable[bytes]) -> dict[str, Any]:
    """The manifest of a package, from the content of its files (or other documents) in order."""
    content, sizes = hashlib.sha256(), []
    for data in files:
        content.update(data)
        sizes.append(len(data))
    return {
        "version": package.version,
        "files": len(sizes),
        "bytes": sum(sizes),
        "sha256": content.hexdigest(),
    }


def say_differences(source: str, packages: Sequence[Package]) -> None:
    """Logs one line if packages of ``data=source`` have other versions than the manifest, which
    need not list all of them."""
    recorded = json.loads(FILE.read_text(encoding="utf-8"))[source]
    differing = [
        f"{package.name} {package.version} (results: {recorded[package.name]['version']})"
        for package in packages
        if package.name in recorded and package.version != recorded[package.name]["version"]
    ]
    if differing:
        log.warning(
            "data=%s is not the text of this project's results: %s. Compare the runs of this "
            "environment only with each other.",
            source,
            ", ".join(differing),
        )


def write(sources: Iterable[Source]) -> None:
    """Write the manifests of the packages that these sources read here: ``make manifests``."""
    manifests = {source.name: source.summary()["packages"] for source in sources}
    FILE.write_text(json.dumps(manifests, indent=1) + "\n", encoding="utf-8")

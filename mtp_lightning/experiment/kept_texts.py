"""Finished texts of a corpus that is being generated, so that a stopped build continues."""

from __future__ import annotations

import json
from pathlib import Path


class KeptTexts:
    """A file of the cache folder with one JSON line per finished text.

    Args:
        file: named by everything that the texts depend on; made with the first text.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[tuple[str, int], list[int]] = {}
        whole = b""
        for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else ():
            try:
                part, index, ids = json.loads(line)
                self._known[str(part), int(index)] = [int(i) for i in ids]
            except (ValueError, TypeError):  # the process was killed while it wrote the line
                break
            whole += line
        if self._known:
            file.write_bytes(whole)

    def of(self, part: str) -> dict[int, list[int]]:
        """The ids of the finished texts of a part, by index."""
        return {index: ids for (name, index), ids in self._known.items() if name == part}

    def add(self, part: str, index: int, ids: list[int]) -> None:
        """Append a finished text."""
        self._known[part, index] = ids
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab") as file:
            file.write(json.dumps([part, index, ids]).encode() + b"\n")

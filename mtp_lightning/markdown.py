"""Writes text from files of unknown origin into Markdown pages."""

from __future__ import annotations

import re

# Characters that Markdown, its extensions or HTML would interpret, in the positions where they do:
# a bracket before another, an underscore at the edge of a word, a mark at the start of a line.
_MARKS = re.compile(
    r"[\\`*{}|~$]|<(?=[a-z/!?])|\](?=[\[(:])|(?<!\w)_|_(?!\w)|&(?=[#\w])"
    r"|^[\[#>=:!?/]|^[+-](?=[\s+-])|^\d+[.)](?=\s)",
    re.IGNORECASE,
)


def plain(text: object) -> str:
    """Return the text as one line that Markdown shows as it is; marks become HTML entities."""
    line = " ".join(str(text).split())
    return _MARKS.sub(lambda mark: "".join(f"&#{ord(letter)};" for letter in mark[0]), line)

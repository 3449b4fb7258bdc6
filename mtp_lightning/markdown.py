"""Text of others in a page of Markdown."""

from __future__ import annotations

import re

# What Markdown, its extensions and HTML take for more than a letter, where they would: a link ends
# in a bracket and another, an underscore within a word is one, a block begins a line.
_MARKS = re.compile(
    r"[\\`*{}|~$]|<(?=[a-z/!?])|\](?=[\[(:])|(?<!\w)_|_(?!\w)|&(?=[#\w])"
    r"|^[\[#>=:!?/]|^[+-](?=[\s+-])|^\d+[.)](?=\s)",
    re.IGNORECASE,
)


def plain(text: object) -> str:
    """In one line that Markdown shows as it is: marks are written as numbers of their letters."""
    line = " ".join(str(text).split())
    return _MARKS.sub(lambda mark: "".join(f"&#{ord(letter)};" for letter in mark[0]), line)

"""Words that comments, docstrings, messages and pages do not use: ``make lint`` runs this file.

A word is read in Python comments and strings, in comments of YAML and C++, and in the text of
Markdown pages; code in backquotes and in code blocks is skipped.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

_STEMS = (
    "categor character dequant discret factor final formal general initial linear local maxim "
    "minim modern neutral normal optim organ parallel penal quant random real recogn regular "
    "renormal serial special stabil standard summar symbol synchron token util vector visual"
)
_ISE = rf"({_STEMS.replace(' ', '|')})is(e|es|ed|er|ers|ing|able|ation|ations)"
_THINGS = (
    "batch block byte column core day depth document epoch file GPU group head job layer line "
    "machine message micro-batch node pass process rank request round row run second step task "
    "token validation window word"
).replace(" ", "|")
# Without those that are verbs, too: "drafts a token".
_COUNTED = (
    "bytes cores entries files jobs numbers one ones rows seconds threads tokens windows"
).replace(" ", "|")

# A regular expression, and what to write instead.
INSTEAD = {
    _ISE: "American spelling: -ize, -ization",
    r"(re)?analys(e|ed|es|ing)": "analyze",
    r"(behavi|col|fav|flav|hon|lab|neighb)our(s|ed|ing|hood|able)?": "American spelling: -or",
    r"cent(re|res|red)": "center",
    r"(cancel|label|level|model|signal|travel)l(ed|ing|er|ers)": "American spelling: one l",
    r"artefacts?": "artifact",
    r"(de|of)fence": "American spelling: -ense",
    r"grey": "gray",
    r"judgement": "judgment",
    r"(learn|spel|burn)t": "American spelling: -ed",
    r"maths": "math",
    r"(whil|among)st": "while, among",
    r"for ever": "forever",
    r"behind": "after; in the sense of place, say where",
    r"beside": "next to, with, or besides",
    r"anew": "again",
    r"once more": "again",
    r"(go|goes|going|went|gone) on(?! (to|the|a|in)\b)": "continue",
    r"whom": "say who does it",
    r"(?<!there )(is|are) no (?!longer\b|more\b|less\b|fewer\b|larger\b|smaller\b)": "is not a",
    r"be content with": "accept",
    r"as dear": "cost as much",
    r"in the midst": "during, in the middle",
    r"all the same(?= *[,.;:)]|$)": "anyway",
    r"none of (the user|this project|ours|hers|his)\b": "not the user's, ...",
    r"let(s|ting)? go of": "release",
    r"tells? of(?! the groups)": "describe, list",
    r"what became of": "the result of",
    r"what (it|they) rests? on": "what it depends on, is measured on",
    r"by heart": "memorize",
    r"parted (by|into|at)": "separated, divided",
    rf"({_COUNTED}) an? ({_THINGS})": "per",
}
_WORDS = re.compile(
    rf"\b(?:{'|'.join(f'(?P<w{i}>{word})' for i, word in enumerate(INSTEAD))})\b", re.IGNORECASE
)
_REASONS = list(INSTEAD.values())

# Files that still have some of these words; `python tests/test_words.py --write` lists them again.
NOT_YET = ROOT / "tests/words_not_yet.txt"

_CODE = re.compile(r"```.*?```|``.*?``|`[^`\n]*`|<[^<>\n]+>|https?://\S+", re.DOTALL)
_FENCE = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
_CPP = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_YAML = re.compile(r"(?:^|\s)#[^\n]*")
_KINDS = (".py", ".yaml", ".md", ".cpp", ".h")


def files() -> list[str]:
    """The tracked files that are read, as paths from the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    skipped = ("CHANGELOG.md", "README.zh-CN.md", "results/", "tests/test_words.py")
    return [
        name
        for name in listed.stdout.split("\0")
        if name.endswith(_KINDS) and not name.startswith(skipped) and (ROOT / name).is_file()
    ]


def prose(file: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of everything in a file that a person reads as text."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if not _WORDS.search(text):  # most files: saves reading them closely
        return
    if file.endswith(".py"):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT or (
                token.string[-1:] in "\"'" and " " in token.string.strip()
            ):
                yield token.start[0], _CODE.sub(_blank, token.string)
    elif file.endswith(".md"):
        yield 1, _CODE.sub(_blank, _FENCE.sub(_blank, text))
    else:
        pattern = _YAML if file.endswith(".yaml") else _CPP
        for found in pattern.finditer(text):
            yield text.count("\n", 0, found.start()) + 1, _CODE.sub(_blank, found.group())


def _blank(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", "_", found.group())


def hits(file: str) -> list[tuple[int, str, str]]:
    """(line, word, what to write instead) of the words that a file should not have."""
    found = []
    for start, text in prose(file):
        for match in _WORDS.finditer(text):
            before, after = text[: match.start()][-1:], text[match.end() :][:1]
            if before in tuple("_./-=") or after in tuple("_=(:/"):
                continue  # a name: normalise=true, data/behind.py
            line = start + text.count("\n", 0, match.start())
            reason = _REASONS[int((match.lastgroup or "w0")[1:])]
            found.append((line, " ".join(match.group().split()), reason))
    return found


def test_no_file_has_words_that_are_not_used() -> None:
    excused = set(NOT_YET.read_text(encoding="utf-8").split())
    wrong = [
        f"{file}:{line}: {word!r}: {reason}"
        for file in files()
        if file not in excused
        for line, word, reason in hits(file)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_words_are_found() -> None:
    for text in ("the one behind it", "Normalised.", "two tokens a window", "it is no number"):
        assert _WORDS.search(text), text
    for text in ("normalized", "there is no number", "emphasis", "realistic", "the optimizer"):
        assert not _WORDS.search(text), text


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        NOT_YET.write_text("".join(f"{file}\n" for file in files() if hits(file)))
    try:
        test_no_file_has_words_that_are_not_used()
    except AssertionError as error:
        sys.exit(str(error))

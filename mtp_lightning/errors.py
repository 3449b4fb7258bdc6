"""The error for mistakes that a user can fix, and the sentences that several places need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable


class UserError(ValueError):
    """A wrong setting, file or folder. The message is one sentence with the value and the remedy.

    The apps print the sentence and exit with code 1. Other errors keep their traceback.
    """


def lacks_memory(error: Exception) -> bool:
    """Whether memory was lacking; for that of a CPU, PyTorch raises a plain RuntimeError."""
    # Compared by name, since importing torch takes time.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)


def reason_of(error: Exception) -> str:
    """The message of an error on one line, without its period, as a part of another sentence."""
    return " ".join(str(error).split()).rstrip(".")


def counted(n: int, noun: str) -> str:
    """``1 job``, ``2 jobs``, ``2,000 passes``."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"


def missing_package(name: str, *, what: str, extra: str | None) -> UserError:
    """The error for an optional package that is not installed, which a setting or file (``what``)
    needs, and which an ``extra`` of this project installs, if there is one."""
    checkout = "" if extra is None else f" (in a checkout: pip install -e '.[{extra}]')"
    return UserError(f"{what} needs the package {name}: pip install {name}{checkout}.")


def require_package(name: str, *, what: str, extra: str) -> None:
    """Refuse a missing package, before hours of work that would fail without it."""
    if importlib.util.find_spec(name) is None:
        raise missing_package(name, what=what, extra=extra)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most similar to a misspelt one; None if none is similar."""
    from difflib import get_close_matches

    matches = get_close_matches(word.lower(), list(known), n=1, cutoff=0.65)
    return matches[0] if matches else None


def suggestion(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The remedy for an unknown word, as a sentence: ``did you mean sequential?`` If no known word
    is similar, it is ``otherwise``, or the list of all known words."""
    known = list(known)
    if near := nearest(word, known):
        return f"did you mean {near}?"
    return otherwise or f"choose one of {', '.join(known) or 'none'}."

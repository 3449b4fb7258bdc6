"""The C++ that ``pip install`` builds: opened only where it was built from the sources beside it.

A library of other sources may compute other numbers by the same names, or read past what it is
given. So setup.py writes the digest of the sources into each, and it is compared before the first
call; where no sources lie beside it, there is nothing to compare with.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
# What a function takes, and what it returns.
Signature = tuple[tuple[Any, ...], Any]


def digest(folder: Path) -> str:
    """Of the C++ in a folder; empty without any."""
    files = sorted(file for file in folder.glob("*") if file.suffix in (".cpp", ".h"))
    text = b"".join(file.name.encode() + b"\0" + file.read_bytes() + b"\0" for file in files)
    return hashlib.blake2b(text, digest_size=16).hexdigest() if files else ""


def open_built(
    file: Path, sources: Path, functions: Mapping[str, Signature]
) -> tuple[ctypes.CDLL | None, str]:
    """A library, or None with the reason in a few words; one that is there and cannot be used is
    warned of.

    Args:
        file: the library.
        sources: the folder of its C++.
        functions: what it must have.
    """
    if os.environ.get("MTP_LIGHTNING_NATIVE") == "0":
        return None, "MTP_LIGHTNING_NATIVE=0"
    if not file.exists():
        return None, "no C++ was built; pip install -e . does where there is g++"
    try:
        found = ctypes.CDLL(str(file))
        for name, (takes, gives) in {**functions, "built_from": ((), ctypes.c_char_p)}.items():
            function = getattr(found, name)
            function.argtypes, function.restype = takes, gives
        fits = digest(sources) in ("", found.built_from().decode())
    except (OSError, AttributeError):
        fits = False
    if fits:
        return found, ""
    log.warning(
        "%s was not built from the C++ in %s, and is left out: pip install -e . builds it anew.",
        file,
        sources,
    )
    return None, "its C++ is out of date; pip install -e . builds it anew"

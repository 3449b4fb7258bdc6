"""Opens the C++ libraries that ``pip install`` builds, if they were built from these sources.

A library of other sources could compute other numbers, or read beyond its arguments. So setup.py
writes the digest of the sources into each library, and it is compared before the first call. An
installation without sources skips the comparison.
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
# A function's argument types and its return type.
Signature = tuple[tuple[Any, ...], Any]


def digest(folder: Path) -> str:
    """Hex digest of a folder's C++ files; empty if there are none."""
    files = sorted(file for file in folder.glob("*") if file.suffix in (".cpp", ".h"))
    text = b"".join(file.name.encode() + b"\0" + file.read_bytes() + b"\0" for file in files)
    return hashlib.blake2b(text, digest_size=16).hexdigest() if files else ""


def open_built(
    file: Path, sources: Path, functions: Mapping[str, Signature]
) -> tuple[ctypes.CDLL | None, str]:
    """Open a library, which must have these functions and be built from the C++ in the folder
    ``sources``. Return it, or None with the reason in a few words; log a warning if it exists and
    cannot be used."""
    if os.environ.get("MTP_LIGHTNING_NATIVE") == "0":
        return None, "MTP_LIGHTNING_NATIVE=0"
    if not file.exists():
        return None, "no C++ was built; pip install -e . does where there is g++"
    try:
        library = ctypes.CDLL(str(file))
        for name, (takes, gives) in {**functions, "built_from": ((), ctypes.c_char_p)}.items():
            function = getattr(library, name)
            function.argtypes, function.restype = takes, gives
        is_current = digest(sources) in ("", library.built_from().decode())
    except (OSError, AttributeError):
        is_current = False
    if is_current:
        return library, ""
    log.warning(
        "%s was not built from the C++ in %s, and is not used: pip install -e . builds it again.",
        file,
        sources,
    )
    return None, "its C++ is out of date; pip install -e . builds it again"

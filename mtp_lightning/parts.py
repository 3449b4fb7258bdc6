"""The parts that come off: packages that attach to the core by registering with it.

The core runs without them. Each is a folder of this package, and deleting the folder removes the
part: no other file of the core names one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

PARTS = ("mtp_lightning.cpu",)


@functools.cache
def load() -> None:
    """Import the parts that are there, each of which registers what it has. Cheap after the first
    call."""
    for name in PARTS:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)

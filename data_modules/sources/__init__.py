"""Sources of text, one file each: ``documents()``, ``fingerprint()`` and a ``name``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtp_lightning.parts import on_demand

if TYPE_CHECKING:
    from data_modules.sources.base import Source
    from data_modules.sources.stdlib import StdlibSource
    from data_modules.sources.synthetic import SyntheticSource
    from data_modules.sources.text import TextSource

__all__ = ["Source", "StdlibSource", "SyntheticSource", "TextSource"]

__getattr__ = on_demand(__name__)

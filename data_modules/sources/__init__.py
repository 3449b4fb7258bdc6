"""Sources of text, one file each: ``documents()``, ``fingerprint()`` and a ``name``."""

from __future__ import annotations

from data_modules.sources.base import Source
from data_modules.sources.huggingface import HuggingFaceSource
from data_modules.sources.literature import LiteratureSource
from data_modules.sources.packages import PackagesSource
from data_modules.sources.shakespeare import ShakespeareSource
from data_modules.sources.stdlib import StdlibSource
from data_modules.sources.synthetic import SyntheticSource
from data_modules.sources.text import TextSource

__all__ = [
    "HuggingFaceSource",
    "LiteratureSource",
    "PackagesSource",
    "ShakespeareSource",
    "Source",
    "StdlibSource",
    "SyntheticSource",
    "TextSource",
]

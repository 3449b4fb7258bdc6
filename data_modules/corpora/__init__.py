"""Corpora of others: sources that need a package or another program's installation.

This folder can be deleted as a whole. ``data_modules.sources`` hands its classes out under its own
name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtp_lightning.parts import on_demand

if TYPE_CHECKING:
    from data_modules.corpora.huggingface import HuggingFaceSource
    from data_modules.corpora.literature import LiteratureSource, ShakespeareSource
    from data_modules.corpora.packages import PackagesSource

__all__ = ["HuggingFaceSource", "LiteratureSource", "PackagesSource", "ShakespeareSource"]

__getattr__ = on_demand(__name__)

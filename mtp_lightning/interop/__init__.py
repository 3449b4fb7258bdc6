"""Models of other programs: Hugging Face folders and GGUF files, read, written and examined.

This folder is optional: runs of this project train, evaluate and draft without it. It adds two
formats to ``open_model`` (``mtp_lightning/parts.py``), ``export.py`` and ``doctor.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtp_lightning.parts import on_demand

if TYPE_CHECKING:
    from mtp_lightning.interop.doctor import examine
    from mtp_lightning.interop.exporting import export
    from mtp_lightning.interop.reading import read

__getattr__ = on_demand(__name__)

__all__ = ["examine", "export", "read"]

"""Token files of other programs, read where they lie. This folder can be deleted as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtp_lightning.parts import on_demand

if TYPE_CHECKING:
    from data_modules.token_files.data_module import TokenFilesDataModule

__all__ = ["TokenFilesDataModule"]

__getattr__ = on_demand(__name__)

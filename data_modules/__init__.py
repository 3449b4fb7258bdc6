"""Data for multi-token prediction: sources, tokenizers, token store and files, loader; tasks.

``import data_modules`` is cheap: the model imports only ``data_modules.windows``, and Lightning
(seconds to import) is loaded only when a data module is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtp_lightning.parts import on_demand

if TYPE_CHECKING:
    from data_modules.data_module import TokenDataModule
    from data_modules.tasks.data_module import TaskDataModule
    from data_modules.window_module import WindowDataModule

__all__ = ["TaskDataModule", "TokenDataModule", "WindowDataModule"]

__getattr__ = on_demand(__name__)

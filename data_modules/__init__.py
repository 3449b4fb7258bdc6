"""Data for multi-token prediction: sources, tokenizers, token store and files, loader; tasks.

``import data_modules`` is cheap: the model imports only ``data_modules.windows``, and Lightning
(seconds to import) is loaded only when a data module is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_modules.data_module import TokenDataModule
    from data_modules.tasks.data_module import TaskDataModule
    from data_modules.token_files.data_module import TokenFilesDataModule
    from data_modules.window_module import WindowDataModule

__all__ = ["TaskDataModule", "TokenDataModule", "TokenFilesDataModule", "WindowDataModule"]


def __getattr__(name: str) -> Any:
    if name == "TokenDataModule":
        from data_modules.data_module import TokenDataModule

        return TokenDataModule
    if name == "TaskDataModule":
        from data_modules.tasks.data_module import TaskDataModule

        return TaskDataModule
    if name == "TokenFilesDataModule":
        from data_modules.token_files.data_module import TokenFilesDataModule

        return TokenFilesDataModule
    if name == "WindowDataModule":
        from data_modules.window_module import WindowDataModule

        return WindowDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Data for multi-token prediction: sources, tokenizers, packed token store, resumable loader.

``import data_modules`` is cheap on purpose: the model imports ``data_modules.windows`` alone, and
Lightning (seconds to import) is loaded only when ``TokenDataModule`` is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_modules.data_module import TokenDataModule

__all__ = ["TokenDataModule"]


def __getattr__(name: str) -> Any:
    if name == "TokenDataModule":
        from data_modules.data_module import TokenDataModule

        return TokenDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The Lightning plugin for `trainer.precision=64-true`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.precision import DoublePrecision


class TokenDoublePrecision(DoublePrecision):
    """Double precision for models that read token ids.

    Lightning's own plugin converts the floats in every batch to doubles, and fails on frozen
    dataclasses. A batch of windows holds only integers, so there is nothing to convert.
    """

    def convert_input(self, data: Any) -> Any:
        """Returns the batch unchanged."""
        return data

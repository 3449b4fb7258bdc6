"""The Lightning plugin behind `trainer.precision=64-true`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.precision import DoublePrecision


class TokenDoublePrecision(DoublePrecision):
    """Double precision for models that read token ids.

    Lightning's own walks through every batch to turn floats into doubles, and refuses frozen
    dataclasses on the way. A batch of windows holds integers only: there is nothing to turn.
    """

    def convert_input(self, data: Any) -> Any:
        """The batch as it is."""
        return data

"""The Lightning plugin that makes every checkpoint of a run atomic, plain and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from mtp_lightning.errors import UserError
from mtp_lightning.run import checkpoints


class AtomicCheckpointIO(CheckpointIO):
    """Saves and loads through `mtp_lightning.run.checkpoints`, for `Trainer(plugins=[...])`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes atomically; see `checkpoints.save` for the errors."""
        if storage_options is not None:
            raise UserError(
                f"storage_options are not supported for checkpoints: {storage_options!r}."
            )
        checkpoints.save(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Checks for damage, then loads plain values only; refuses `weights_only=False`."""
        if weights_only is False:
            raise UserError(
                "Checkpoints are only loaded with weights_only=True: do not ask for False."
            )
        return checkpoints.load(path, "cpu" if map_location is None else map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes the file if it exists."""
        Path(path).unlink(missing_ok=True)

"""Reading what a run left: the model in its folder, or in one of its checkpoints."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig
from mtp_lightning.opening import StoredModel, require_held
from mtp_lightning.run import checkpoints
from mtp_lightning.run.layout import BEST, CHECKPOINTS, LAST


def read(path: Path, *, allow: Collection[str] = ()) -> StoredModel:
    """The reader of runs, see :func:`~mtp_lightning.opening.open_model`.

    Args:
        path: a run folder or a checkpoint file.
        allow: packages whose variants the checkpoint may ask for.

    Raises:
        FileNotFoundError: no checkpoint there.
        UserError: it is damaged, or was not written by this platform, or its config asks for more
            than it holds, or for a package that is not allowed.
    """
    needs = ("model_config", "state_dict", "tokenizer", "config")
    file, checkpoint = read_checkpoint(path, needs=needs)
    config = model_config(checkpoint, source=file, allow=allow)
    weights = model_weights(checkpoint)
    require_held(config, weights, source=str(file))
    return StoredModel(
        path=file,
        config=config,
        weights=weights,
        tokenizer_state=checkpoint["tokenizer"],
        brings_trunk=brought_trunk(checkpoint),
        run_config=checkpoint["config"],
        step=checkpoint["global_step"],
        threads=checkpoint.get("threads"),
    )


def brought_trunk(checkpoint: dict[str, Any]) -> bool:
    """Whether the trunk of a checkpoint's run came from elsewhere: only such a run says in its
    config how many rows the vocabulary has; else the tokenizer decides."""
    return "vocab_size" in checkpoint.get("config", {}).get("model", {})


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by a file, a run folder (its best one) or a checkpoints folder.

    Raises:
        FileNotFoundError: nothing there, or no checkpoint in it.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"There is no checkpoint or run folder at {path}.")
    for folder in (path / CHECKPOINTS, path):
        best = folder / BEST
        if best.is_file() and checkpoints.intact(best):
            return best
        newest = checkpoints.newest_intact(folder) if folder.is_dir() else None
        if newest is not None:
            return newest
    raise FileNotFoundError(
        f"{path} holds no intact checkpoint: give a run folder (with checkpoints/) or a .ckpt file."
    )


def read_checkpoint(path: str | Path, *, needs: Collection[str]) -> tuple[Path, dict[str, Any]]:
    """The file that :func:`find_checkpoint` finds, and what is in it.

    Args:
        path: a run folder or a checkpoint file.
        needs: keys that must be in it.

    Raises:
        FileNotFoundError: no checkpoint there.
        UserError: it is damaged, or was not written by this platform.
    """
    file = find_checkpoint(path)
    checkpoint = checkpoints.load(file, optimizer=False)
    missing = set(needs) - checkpoint.keys()
    if missing:
        raise UserError(
            f"{file} is not a checkpoint of this platform: it has no {', '.join(sorted(missing))}."
        )
    return file, checkpoint


def model_config(
    checkpoint: dict[str, Any], *, source: Path, allow: Collection[str] = ()
) -> ModelConfig:
    """The model that a checkpoint describes.

    Args:
        checkpoint: its content.
        source: its file, for messages.
        allow: packages whose variants it may ask for.

    Raises:
        UserError: a description that no model has, or that needs a package that is not allowed.
    """
    try:
        return ModelConfig.from_dict(checkpoint["model_config"], allow=allow)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{source} describes no model: {error}") from error


def model_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's part of a checkpoint's tensors, by the model's own names."""
    prefix = "model."
    state = checkpoint["state_dict"]
    return {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}


def describe_interrupt(folder: Path) -> str:
    """What Ctrl-C left, and how to go on from there."""
    last = folder / CHECKPOINTS / LAST
    if not last.is_file():
        return "interrupted before the first checkpoint: nothing was saved."
    step = checkpoints.stored_step(last)
    return f"interrupted; saved is step {step}: the same command with run_dir={folder} continues."

"""Reads a trained model from a run's folder or checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from mtp_lightning import parts
from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig
from mtp_lightning.registry import NotAllowed
from mtp_lightning.run import checkpoints
from mtp_lightning.run.layout import BEST, CHECKPOINTS, LAST, kept_at
from mtp_lightning.weights import StoredModel, require_held

_KINDS = (
    "a run folder (with checkpoints/), a .ckpt file, a folder in Hugging Face's layout (with "
    "config.json) or a .gguf file"
)


def read(path: Path, *, allow: Collection[str] = ()) -> StoredModel:
    """Read the model of a run folder or checkpoint file, which may use the variants of the packages
    in ``allow``. :func:`~mtp_lightning.opening.open_model` calls this for runs.

    Raises:
        FileNotFoundError: there is no checkpoint.
        UserError: the checkpoint is damaged or not this project's, its config needs more weights
            than it holds, or it uses a package that is not allowed.
    """
    needs = ("model_config", "state_dict", "tokenizer", "config", "global_step")
    file, checkpoint = read_checkpoint(path, needs=needs)
    config = model_config(checkpoint, source=file, allow=allow)
    weights = model_weights(checkpoint)
    require_held(config, weights, source=str(file))
    return StoredModel(
        path=file,
        config=config,
        weights=weights,
        tokenizer_state=checkpoint["tokenizer"],
        brings_trunk=has_imported_trunk(checkpoint),
        run_config=checkpoint["config"],
        step=checkpoint["global_step"],
        threads=checkpoint.get("threads"),
    )


def has_imported_trunk(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint's run imported its trunk. Only such a run's config has the size of the
    vocabulary; otherwise the tokenizer decides it."""
    return "vocab_size" in checkpoint.get("config", {}).get("model", {})


def find_checkpoint(path: str | Path) -> Path:
    """Find the checkpoint of a path: the file itself, the best one of a run folder or a checkpoints
    folder, or the one of an optimizer step (``RUN@STEP``).

    Raises:
        FileNotFoundError: the path does not exist, or has no intact checkpoint.
        UserError: the path is a file of another kind, or the run has no checkpoint of the step.
    """
    path = Path(path)
    if "@" in path.name and not path.exists():
        return checkpoint_of_step(str(path))
    if path.is_file():
        if path.suffix != ".ckpt":
            raise UserError(f"{path} is not a checkpoint: give {_KINDS}.")
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"There is no checkpoint or run folder at {path}.")
    for folder in (path / CHECKPOINTS, path):
        if checkpoints.intact(folder / BEST):
            return folder / BEST
        if (newest := checkpoints.newest_intact(folder)) is not None:
            return newest
    inside = (f for f in sorted(path.iterdir()) if (f / CHECKPOINTS).is_dir() or parts.reader(f))
    remedy = f"did you mean {near}?" if (near := next(inside, None)) else f"give {_KINDS}."
    raise FileNotFoundError(f"{path} holds no intact checkpoint: {remedy}")


def checkpoint_of_step(text: str) -> Path:
    """Find the checkpoint that ``RUN@STEP`` names.

    Raises:
        FileNotFoundError: the run does not exist.
        UserError: the text has another form, or the run has no intact checkpoint of that step.
    """
    run, _, number = text.rpartition("@")
    if not run or not number.isascii() or not number.isdigit() or len(number) > 18:
        raise UserError(
            f"{text} names no checkpoint: give a run's folder and an optimizer step, as in "
            "runs/long@600."
        )
    folder, step = Path(run) / CHECKPOINTS, int(number)
    if not folder.is_dir():
        raise FileNotFoundError(f"{text}: there is no run in {run}.")
    kept = folder / kept_at(step)
    if checkpoints.inspect(kept)[1] == step:
        return kept
    # This is slow: it reads all checkpoints whole, for their checksums.
    by_step = {checkpoints.inspect(path)[1]: path for path in sorted(folder.glob("*.ckpt"))}
    if step not in by_step:
        steps = ", ".join(str(n) for n in sorted(by_step) if n >= 0) or "none"
        raise UserError(
            f"{text}: that run has no intact checkpoint of step {step} (there are: {steps}); "
            f"callbacks.checkpoints.keep_steps=[{step}] keeps one."
        )
    return by_step[step]


def read_checkpoint(path: str | Path, *, needs: Collection[str]) -> tuple[Path, dict[str, Any]]:
    """Read the checkpoint that :func:`find_checkpoint` finds, which must have the keys ``needs``.
    Return the file, and its content without the optimizer's state.

    Raises:
        FileNotFoundError: there is no checkpoint.
        UserError: the checkpoint is damaged or not this project's.
    """
    file = find_checkpoint(path)
    checkpoint = checkpoints.load(file, optimizer=False)
    missing = set(needs) - (checkpoint.keys() if isinstance(checkpoint, dict) else set())
    if missing:
        raise UserError(
            f"{file} is not a checkpoint of this platform: it has no {', '.join(sorted(missing))}."
        )
    return file, checkpoint


def model_config(
    checkpoint: dict[str, Any], *, source: Path, allow: Collection[str] = ()
) -> ModelConfig:
    """Build the model config that a checkpoint (the content of the file ``source``) describes; it
    may use the variants of the packages in ``allow``.

    Raises:
        UserError: the description is not valid, or needs a package that is not allowed.
    """
    try:
        return ModelConfig.from_dict(checkpoint["model_config"], allow=allow)
    except NotAllowed as error:
        raise UserError(f"{source} cannot be read: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{source} describes no model: {error}") from error


def model_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint, by their names in :class:`MTPModel`."""
    state = checkpoint["state_dict"].items()
    return {name.removeprefix("model."): t for name, t in state if name.startswith("model.")}


def describe_interrupt(folder: Path) -> str:
    """Say which checkpoint an interrupted run has, and how to continue the run."""
    from mtp_lightning.run.status import state_of

    last = folder / CHECKPOINTS / LAST
    if not last.is_file():
        return "interrupted before the first checkpoint: nothing was saved."
    again = f"the same command with {shlex.quote(f'run_dir={folder}')}"
    if state_of(folder) == "running":  # a sweep's job, which ends before the sweep says so
        again = "the command of its sweep"
    return f"interrupted; step {checkpoints.stored_step(last)} is saved: {again} continues."

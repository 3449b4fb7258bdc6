"""Metrics and text of a trained model, and the folder of a call."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.notebook.process import start
from mtp_lightning.notebook.text import Text
from mtp_lightning.paths import app
from mtp_lightning.stored import read_json


def evaluate(*overrides: str, quiet: bool = True) -> dict[str, Any]:
    """``python evaluate.py OVERRIDES``: the metrics of a trained model by log tag.

    Args:
        overrides: as on the command line: ``"checkpoint=runs/mine"``.
        quiet: show no output.

    Raises:
        RuntimeError: if it failed, with one sentence.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Hydra takes the last of two values.
        output = Path(_value("output", overrides) or f"{folder}/metrics.json")
        start([*app("evaluate"), *overrides, f"output={output}"], quiet=quiet)
        found: dict[str, Any] = read_json(output)
    return found


def generate(*overrides: str) -> Text:
    """``python generate.py OVERRIDES`` for one prompt, in this process.

    Args:
        overrides: as on the command line: ``"checkpoint=runs/mine"``, ``"prompt=def main("``.

    Raises:
        UserError: for a missing prompt, a damaged or unknown checkpoint, or an option out of range.
        OSError: if there is no such checkpoint.
    """
    from mtp_lightning.experiment.compose import compose_config
    from mtp_lightning.experiment.generating import continue_prompts, open_for

    cfg = compose_config("generate", overrides)
    if cfg.prompt is None:
        raise UserError("There is no prompt: give prompt=TEXT.")
    run = open_for(cfg)
    prompt = str(cfg.prompt)
    (generation,) = continue_prompts(cfg, run, [prompt])
    return Text(prompt, generation, run.tokenizer)


def output_folder(key: str, pattern: str, overrides: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder that a call writes to, and the overrides with that folder."""
    value = _value(key, overrides)
    if value is not None:
        return Path(value), list(overrides)
    folder = Path(pattern.format(datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")))
    return folder, [*overrides, f"{key}={folder}"]


def _value(key: str, overrides: Sequence[str]) -> str | None:
    """The path that the last override of a key gives; None if there is none."""
    given = [text.partition("=")[2] for text in overrides if text.startswith(f"{key}=")]
    if not given:
        return None
    path = given[-1]
    if "${" in path:
        raise UserError(f"{key}={path} is resolved only inside the run: give the path itself.")
    quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""
    return path[1:-1] if quoted else path

"""The inputs of a case's commands: a finished run, and files in the folder of the case."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.chaos.cases import hold
from tests.chaos.jobs import SMALL
from tests.chaos.processes import run
from tests.integration.helpers import overrides

QUICK = {**SMALL, "trainer.max_steps": 1, "trainer.val_check_interval": 1}
# Settings of a run on a text and on a file of tokens.
AS_TEXT = {"data": "text", "data.source.size": None, "data.source.documents": None}
AS_TOKENS = {**AS_TEXT, "data": "tokens", "tokenizer": "ids", "data.val_fraction": None}
LLAMA = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 257, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
SECRET = "the secret of another folder"
# Code that makes a file when it is unpickled.
_CODE = "__import__('pathlib').Path({!r}).touch()"


class Finished:
    """The small run without a fault, made at its first use."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self._folder, self._cache = folder, cache

    def arguments(self, folder: Path, **more: Any) -> list[str]:
        """The command of the same run in another folder."""
        return ["train.py", *overrides(self._cache, {**SMALL, **more}), f"run_dir={folder}"]

    @property
    def run(self) -> Path:
        """Its folder."""
        if not (self._folder / "summary.json").exists():
            ended = run(self.arguments(self._folder), self._folder.with_suffix(".log"))
            hold(ended.code == 0, f"without a fault it fails: {ended.out[-1500:]}")
        return self._folder

    @property
    def checkpoint(self) -> Path:
        """Its last checkpoint."""
        return self.run / "checkpoints" / "last.ckpt"

    def as_it_is(self) -> dict[str, int]:
        """Its files with their times."""
        return {str(f): f.stat().st_mtime_ns for f in self.run.rglob("*") if f.is_file()}


class Place:
    """The folder of a case; its folder ``given`` holds the input files.

    Args:
        folder: empty.
        finished: a run.
    """

    def __init__(self, folder: Path, finished: Finished) -> None:
        self.folder, self.finished = folder, finished
        self.given = folder / "given"
        self.given.mkdir()
        self.canary = folder / "canary"
        self.secret = folder / "secret.txt"
        self.secret.write_text(SECRET)

    def payload(self) -> Any:
        """An object whose pickle makes the canary."""
        return _Payload(str(self.canary))

    def write(self, name: str, content: bytes) -> Path:
        """A file."""
        file = self.given / name
        file.write_bytes(content)
        return file

    def checkpoint(self, change: Callable[[dict[str, Any]], object]) -> Path:
        """A checkpoint of the run with a change."""
        content = torch.load(self.finished.checkpoint, weights_only=True)
        change(content)
        file = self.given / "changed.ckpt"
        torch.save(content, file)
        return file

    def run(self, change: Callable[[dict[str, Any]], object]) -> Path:
        """A copy of the run whose checkpoint has a change."""
        copy = self.given / "run"
        shutil.copytree(self.finished.run, copy)
        for file in (copy / "checkpoints").iterdir():
            file.unlink()
        shutil.move(self.checkpoint(change), copy / "checkpoints" / "last.ckpt")
        return copy

    def model(self, config: object, **files: bytes) -> Path:
        """A Hugging Face folder; the config may be JSON's text."""
        folder = self.given / "model"
        folder.mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return folder


class _Payload:
    def __init__(self, canary: str) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (_CODE.format(self._canary),)


# Makes the input of a command.
Make = Callable[[Place], Path]
# The command line for an input and the folder of the case.
Command = Callable[[Path, Path], list[str]]


def written(name: str, content: bytes) -> Make:
    """Makes a file."""
    return lambda place: place.write(name, content)


def changed(change: Callable[[dict[str, Any]], object]) -> Make:
    """Makes a checkpoint of the run with a change."""
    return lambda place: place.checkpoint(change)


def safetensors(
    header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None
) -> bytes:
    """The content of a file of tensors; ``length`` is the stated length of its header."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def app(name: str, *given: str) -> Command:
    """An app that reads a checkpoint; ``given`` replaces its usual arguments."""
    defaults = {"generate": ["prompt=ab", "max_new_tokens=4"], "export": ["verify=false"]}
    typed = {word.partition("=")[0] for word in given}

    def command(checkpoint: Path, folder: Path) -> list[str]:
        usual = [f"output={folder / 'out'}"] if name == "export" else []
        usual += [f"checkpoint={checkpoint}", *defaults.get(name, [])]
        return [f"{name}.py", *(w for w in usual if w.partition("=")[0] not in typed), *given]

    return command


def train(key: str, cache: Path, settings: dict[str, Any] | None = None) -> Command:
    """A run of one step, or a resumed run, that gets a path by ``key``."""

    def command(given: Path, folder: Path) -> list[str]:
        both = {**QUICK, **(settings or {})}
        if key == "run_dir":
            both["trainer.max_steps"] = 50
            return ["train.py", *overrides(cache, both), f"run_dir={given}"]
        value = f"[{given}]" if key == "data.paths" else str(given)
        return ["train.py", *overrides(cache, {**both, key: value}), f"run_dir={folder / 'run'}"]

    return command

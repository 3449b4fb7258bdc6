"""``mtp-lightning COMMAND ...``: one command for the apps and tools."""

from __future__ import annotations

import importlib
import os
import runpy
import sys

from mtp_lightning import parts
from mtp_lightning.command_line.shell import readable_errors, version
from mtp_lightning.errors import suggestion

_NAME = "mtp-lightning"
# Hydra apps, which are modules of mtp_lightning.apps.
APPS = {
    "train": "train a model with multi-token prediction; -m for sweeps",
    "evaluate": "compute the metrics of a trained model",
    "generate": "generate text with a trained model",
    "serve": "serve a trained model over OpenAI's HTTP interface",
    "export": "write a trained model as a Hugging Face folder or a GGUF file",
}
# Programs with their own options: the module of their main(), and their help.
TOOLS = {
    "work": ("sweeps.work", "run the jobs of a planned sweep; start as many workers as you like"),
    "status": ("sweeps.status", "show the states of a sweep's jobs"),
    "doctor": ("mtp_lightning.apps.doctor", "check the MTP layers of a folder"),
    **{name: part.command for name, part in parts.PARTS.items() if part.command},
}


def main() -> None:
    """The console command."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in APPS:
        # Start the app as `python -m` does, so that it starts a run's other processes (a sweep's
        # jobs, the ranks of a data-parallel run) in the same way. PYTHONSAFEPATH keeps all of them
        # from importing packages from the current folder.
        os.environ["PYTHONSAFEPATH"] = "1"
        del sys.argv[1]
        runpy.run_module(f"{_NAME.replace('-', '_')}.apps.{command}", None, "__main__", True)
    elif command in TOOLS:
        if (part := parts.absent(TOOLS[command][0])) is not None:
            sys.exit(f"error: {parts.missing(part, f'{_NAME} {command}')}")
        module = importlib.import_module(TOOLS[command][0])
        module.main(sys.argv[2:], program=f"{_NAME} {command}")
    elif command in ("-h", "--help", "help"):
        with readable_errors(ends_with_reader=True):
            print(_help())
    elif command == "--version":
        print(version())
    else:
        remedy = suggestion(command, [*APPS, *TOOLS])
        sys.exit(f"error: {command} is not a command: {remedy} ({_NAME} --help)")


def _help() -> str:
    descriptions = {**APPS, **{name: text for name, (_, text) in TOOLS.items()}}
    lines = "\n".join(f"  {name:<10}{text}" for name, text in descriptions.items())
    return f"usage: {_NAME} COMMAND ...\n\n{lines}\n\n{_NAME} COMMAND --help explains each."

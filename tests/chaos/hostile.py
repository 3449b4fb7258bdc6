"""Hostile input: nothing of a file is executed, nothing outside is read or written, and no file
makes a command take more time or memory than it is worth.

A canary is a file that foreign code would make; a secret is one that a path in a file points to.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.bad_input import QUICK, Finished
from tests.chaos.cases import Case, hold
from tests.chaos.hostile_files import (
    CHECKPOINTS,
    FOLDERS,
    RUNS,
    SECRET,
    TEXTS,
    TOKENS,
    Make,
    Place,
)
from tests.chaos.processes import Ended, run
from tests.integration.helpers import overrides

# What a command may hold beyond what it begins with, and how long it may take on a crowded machine.
MEMORY, SECONDS = 3 << 30, 120


def cases(folder: Path) -> list[Case]:
    """Files for every command that reads some."""
    cache = folder / "cache"
    finished = Finished(folder / "finished", cache)
    made = []
    no_source = {"data.source.size": None, "data.source.documents": None}
    as_text = {"data": "text", **no_source}
    as_tokens = {"data": "tokens", "tokenizer": "ids", "data.val_fraction": None, **no_source}
    for name, make in CHECKPOINTS.items():
        for app in ("evaluate", "generate", "export"):
            made.append(_case(f"{app} of {name}", make, _app(app), finished))
        made.append(_case(f"init_from {name}", make, _train("init_from", cache), finished))
    for name, make in RUNS.items():
        made.append(_case(f"going on with {name}", make, _train("run_dir", cache), finished))
        made.append(_case(f"generate of {name}", make, _app("generate"), finished))
    for name, make in FOLDERS.items():
        made.append(_case(f"generate of {name}", make, _app("generate"), finished))
        made.append(_case(f"init_from {name}", make, _train("init_from", cache), finished))
    for name, make in TEXTS.items():
        made.append(
            _case(f"a text of {name}", make, _train("data.paths", cache, as_text), finished)
        )
    for name, make in TOKENS.items():
        made.append(
            _case(f"tokens of {name}", make, _train("data.path", cache, as_tokens), finished)
        )
    return made


def _case(
    name: str, make: Make, command: Callable[[Path, Path], list[str]], finished: Finished
) -> Case:
    def attempt(folder: Path, chance: random.Random) -> str:
        place = Place(folder, finished)
        given = make(place)
        arguments = command(given, folder)
        ended = run(arguments, folder / "log", folder=folder, memory=MEMORY, timeout=SECONDS)
        return harmless(ended, place)

    return Case("hostile input", name, attempt)


def harmless(ended: Ended, place: Place) -> str:
    """It was refused in a sentence, or read for what it is; nothing else happened."""
    hold(not place.canary.exists(), "foreign code was executed")
    hold(not ended.timed_out, f"it takes more than {SECONDS} s")
    hold(SECRET not in ended.out, "the secret was read")
    for file in place.folder.rglob("*"):
        theirs = file == place.secret or file.is_relative_to(place.given)
        if file.is_file() and not theirs and file.stat().st_size < 1 << 20:
            hold(SECRET.encode() not in file.read_bytes(), f"the secret is in {file.name}")
    hold("Traceback" not in ended.out, f"a traceback: {ended.out[-1500:]}")
    hold(ended.code in (0, 1, 2), f"code {ended.code}: {ended.out[-800:]}")
    hold("\x1b]" not in ended.out, "an escape code reaches the terminal")
    said = [line for line in ended.out.splitlines() if line.startswith("error: ")]
    return f"code {ended.code}, {ended.memory >> 20} MiB" + (f", {said[0][:120]}" if said else "")


def _app(app: str) -> Callable[[Path, Path], list[str]]:
    asked = {"generate": ["prompt=ab", "max_new_tokens=4"], "export": ["verify=false"]}

    def command(given: Path, folder: Path) -> list[str]:
        output = [f"output={folder / 'out'}"] if app == "export" else []
        return [f"{app}.py", f"checkpoint={given}", *asked.get(app, []), *output]

    return command


def _train(
    key: str, cache: Path, settings: dict[str, Any] | None = None
) -> Callable[[Path, Path], list[str]]:
    def command(given: Path, folder: Path) -> list[str]:
        value = f"[{given}]" if key == "data.paths" else str(given)
        both = {**QUICK, **(settings or {})}
        if key == "run_dir":
            both["trainer.max_steps"] = 50
            return ["train.py", *overrides(cache, both), f"run_dir={given}"]
        return ["train.py", *overrides(cache, {**both, key: value}), f"run_dir={folder / 'run'}"]

    return command

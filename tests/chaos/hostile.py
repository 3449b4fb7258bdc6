"""Hostile input: nothing of a file is executed, nothing outside is read or written, and no file
makes a command take more time or memory than it is worth.

A canary is a file that foreign code would make; a secret is one that a path in a file points to.
"""

from __future__ import annotations

import random
from pathlib import Path

from tests.chaos.cases import Case, hold
from tests.chaos.given import AS_TEXT, AS_TOKENS, SECRET, Command, Finished, Make, Place, app, train
from tests.chaos.hostile_files import CHECKPOINTS, FOLDERS, RUNS, TEXTS, TOKENS
from tests.chaos.processes import Ended, run

# What a command may hold beyond what it begins with, and how long it may take on a crowded machine.
MEMORY, SECONDS = 3 << 30, 120


def cases(folder: Path) -> list[Case]:
    """Files for every command that reads some."""
    cache = folder / "cache"
    finished = Finished(folder / "finished", cache)
    apps = {f"{name} of": app(name) for name in ("evaluate", "generate", "export")}
    generate, start = {"generate of": app("generate")}, {"init_from": train("init_from", cache)}
    read: list[tuple[dict[str, Make], dict[str, Command]]] = [
        (CHECKPOINTS, apps | start),
        (RUNS, {"continuing": train("run_dir", cache)} | generate),
        (FOLDERS, generate | start),
        (TEXTS, {"a text of": train("data.paths", cache, AS_TEXT)}),
        (TOKENS, {"tokens of": train("data.path", cache, AS_TOKENS)}),
    ]
    return [
        _case(f"{how} {what}", make, command, finished)
        for files, commands in read
        for what, make in files.items()
        for how, command in commands.items()
    ]


def _case(name: str, make: Make, command: Command, finished: Finished) -> Case:
    def attempt(folder: Path, chance: random.Random) -> str:
        place = Place(folder, finished)
        arguments = command(make(place), folder)
        ended = run(arguments, folder / "log", folder=folder, memory=MEMORY, timeout=SECONDS)
        return harmless(ended, place)

    return Case("hostile input", name, attempt)


def harmless(ended: Ended, place: Place) -> str:
    """It was refused in a sentence, or read for what it is; nothing else happened."""
    hold(not place.canary.exists(), "foreign code was executed")
    hold(SECRET not in ended.out, "the secret was read")
    for file in place.folder.rglob("*"):
        theirs = file == place.secret or file.is_relative_to(place.given)
        if file.is_file() and not theirs and file.stat().st_size < 1 << 20:
            hold(SECRET.encode() not in file.read_bytes(), f"the secret is in {file.name}")
    ended.require(0, 1, 2)
    hold("\x1b]" not in ended.out, "an escape code reaches the terminal")
    said = "".join(f", {error[:120]}" for error in ended.errors[:1])
    return f"code {ended.code}, {ended.memory >> 20} MiB{said}"

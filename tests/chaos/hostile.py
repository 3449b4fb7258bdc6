"""Hostile input: no code of a file is executed, nothing outside is read or written, and time and
memory are bounded.

Foreign code would make the canary, a file; a path in a hostile file points to the secret, a file.
"""

from __future__ import annotations

import random
from pathlib import Path

from tests.chaos.cases import Case, hold
from tests.chaos.given import AS_TEXT, AS_TOKENS, SECRET, Command, Finished, Make, Place, app, train
from tests.chaos.hostile_files import CHECKPOINTS, FOLDERS, RUNS, TEXTS, TOKENS
from tests.chaos.processes import Ended, run

# The memory that a command may add to its start, and its seconds on a crowded machine.
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
    """Hold that it was refused in a sentence or read as data, without another effect."""
    hold(not place.canary.exists(), "foreign code was executed")
    hold(SECRET not in ended.out, "the secret was read")
    for file in place.folder.rglob("*"):
        theirs = file == place.secret or file.is_relative_to(place.given)
        if file.is_file() and not theirs and file.stat().st_size < 1 << 20:
            hold(SECRET.encode() not in file.read_bytes(), f"the secret is in {file.name}")
    ended.require(0, 1, 2)
    hold("\x1b]" not in ended.out, "an escape code reaches the terminal")
    error = "".join(f", {line[:120]}" for line in ended.errors[:1])
    return f"code {ended.code}, {ended.memory >> 20} MiB{error}"

"""The command line of a benchmark, its tables, and its JSON file.

A command is a function that prints its tables and returns what goes into the file; its parameters
are its options.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row

Function = Callable[..., Row]

# Help of parameters that mean the same everywhere.
_HELPS = {
    "model": "a size of conf/model",
    "models": "each with its batch, depths and vocabulary",
    **dict.fromkeys(("vocab_size", "vocab_sizes"), "V, token ids"),
    **dict.fromkeys(("depth", "depths"), "D"),
    "batch_size": "windows",
    "seq_len": "tokens of a window",
    "repeats": "figures are medians over them",
    "turns": "of every side",
    "rounds": "of all ways",
}


def command(
    *,
    quick: Mapping[str, Any] | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
    cpu_time: bool = False,
) -> Callable[[Function], Function]:
    """Make a function a command: ``name: type = default`` becomes ``--name``.

    A parameter without a default is required; a positional-only one is a word without ``--``; a
    list takes several words, numbers also with commas; a flag that defaults to True is ``--no-x``.
    What the docstring says under ``Args`` is the help.

    Args:
        quick: defaults with ``--quick``, which the command has only if it has some.
        choices: the words that a parameter takes.
        cpu_time: whether it has ``--cpu-time``, since it reads ``harness.clock``.
    """

    def mark(function: Function) -> Function:
        vars(function).update(quick=quick or {}, choices=choices or {}, cpu_time=cpu_time)
        return function

    return mark


def program(module: str, about: str | None, *functions: Function) -> Callable[..., Row]:
    """The ``main`` of a benchmark: ``python -m benchmarks.MODULE [COMMAND] ...``.

    Args:
        module: its name.
        about: its docstring.
        functions: its commands, called as they are named; the first one needs no word.

    Returns:
        A function of the words typed, which returns what was written as JSON: the command's
        result, its options, and the machine.
    """
    commands = {function.__name__: function for function in functions}
    default = functions[0].__name__

    def main(arguments: Sequence[str] | None = None) -> Row:
        given = list(sys.argv[1:] if arguments is None else arguments)
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{module}",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if len(commands) == 1:
            parser.set_defaults(command=default)
            _add_options(parser, functions[0])
        else:
            if not given or given[0] not in {*commands, "-h", "--help"}:
                given.insert(0, default)
            words = parser.add_subparsers(dest="command", metavar="COMMAND")
            for name, function in commands.items():
                text = (inspect.getdoc(function) or "").partition("\nArgs:")[0].strip()
                own = words.add_parser(name, help=text.partition("\n")[0], description=text)
                _add_options(own, function)
        options = vars(parser.parse_args(given))
        return _run(commands[options.pop("command")], options)

    return main


def _run(function: Function, options: Row) -> Row:
    output: Path = options.pop("output")
    if options.pop("cpu_time", False):
        harness.use_cpu_time()
    quick = vars(function)["quick"] if options.pop("quick", False) else {}
    settled, words = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        value = options[name]
        if isinstance(value, list) and value and isinstance(value[0], list):
            value = [one for part in value for one in part]
        settled[name] = quick.get(name, parameter.default) if value is None else value
        if parameter.kind is parameter.POSITIONAL_ONLY:
            words.append(name)
    named = {name: value for name, value in settled.items() if name not in words}
    found = function(*(settled[name] for name in words), **named)
    found = {"benchmark": function.__name__, "options": settled, **found, "machine": machine()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
    print(f"wrote {output}")
    return dict(json.loads(output.read_text(encoding="utf-8")))


def _add_options(parser: argparse.ArgumentParser, function: Function) -> None:
    file = Path(f"benchmarks/results/{function.__name__}.json")
    parser.add_argument("--output", type=Path, default=file, help=f"JSON; default {file}")
    marks = vars(function)
    if marks["quick"]:
        parser.add_argument("--quick", action="store_true", help="a look, not a result")
    if marks["cpu_time"]:
        text = "CPU seconds of one thread: for a machine that does something else, too"
        parser.add_argument("--cpu-time", action="store_true", help=text)
    _, _, args = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    helps = _HELPS | {
        name: " ".join(text.split())
        for name, text in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", args, re.MULTILINE)
    }
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind, default = _without_none(parameter.annotation), parameter.default
        positional = parameter.kind is parameter.POSITIONAL_ONLY
        missing = default is parameter.empty
        dashed = name.replace("_", "-")
        flag = name if positional else f"--{dashed}"
        words = marks["choices"].get(name)
        text = _help(helps.get(name, ""), default, quick=marks["quick"].get(name), words=words)
        options: Row = {"help": text}
        if kind is bool:
            options |= {"action": "store_false" if default else "store_true", "default": None}
            flag, options["dest"] = (f"--no-{dashed}" if default else flag), name
        else:
            (item,) = typing.get_args(kind) or (kind,)
            options["type"] = whole_numbers if item is int and item is not kind else item
            if item is not kind:
                options["nargs"] = "*"
            elif positional and not missing:
                options["nargs"] = "?"
            if words:
                options |= {"choices": list(words), "metavar": name.upper()}
            if positional:
                options["default"] = None
            else:
                options["required"] = missing
        parser.add_argument(flag, **options)


def _without_none(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType):
        (annotation,) = [one for one in typing.get_args(annotation) if one is not types.NoneType]
    return annotation


def _help(text: str, default: Any, *, quick: Any, words: Sequence[str] | None) -> str:
    parts = [text.rstrip(".")] if text else []
    if words:
        parts.append(f"of {', '.join(map(repr, words))}")
    if isinstance(default, tuple):
        shown = "all" if default == tuple(words or ()) else " ".join(map(str, default))
    else:
        shown = str(default)
    if default not in (inspect.Parameter.empty, None, True, False, ()):
        parts.append(f"default {shown}" + ("" if quick is None else f", with --quick {quick}"))
    return "; ".join(parts).replace("%", "%%")


def whole_numbers(text: str) -> list[int]:
    """``"0,1,2"`` -> [0, 1, 2], for argparse."""
    return [int(part) for part in text.split(",")]


def machine() -> Row:
    """What belongs next to a number: the machine, its load, and the versions."""
    import numpy
    import torch

    from benchmarks.same_bits import processor

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "cpu" if harness.counts_cpu_time() else "wall",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def print_table(title: str, columns: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of ``rows``.

    Args:
        title: above it.
        columns: ``"heading: key format; heading: key"``; a row without the key has an empty cell.
        rows: the numbers; a column is aligned to the left if it holds text.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    cells = []
    for column in columns.strip().split(";"):
        heading, _, cell = column.partition(":")
        key, *form = cell.split()
        cells.append((key, "".join(form)))
        text = any(isinstance(row.get(key), str) for row in rows)
        table.add_column(heading.strip(), justify="left" if text else "right")
    for row in rows:
        values = [(row.get(key), form) for key, form in cells]
        table.add_row(*("" if value is None else format(value, form) for value, form in values))
    # In a file or a pipe a table is as wide as its content needs.
    console = Console()
    Console(width=console.width if console.is_terminal else 160).print(table)

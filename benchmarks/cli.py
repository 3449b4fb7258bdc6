"""The command line of a benchmark, its tables, and its JSON file.

A command is a function that prints tables and returns what its JSON file holds. The function's
parameters are the command's options.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import re
import sys
import typing
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row
from mtp_lightning.command_line.shell import readable_errors

Function = Callable[..., Row]

# Help of parameters that mean the same in all benchmarks.
_HELPS = {
    "model": "a size of conf/model",
    "models": "sizes, each with a batch, depths and a vocabulary of its own",
    **dict.fromkeys(("vocab_size", "vocab_sizes"), "V, token ids"),
    **dict.fromkeys(("depth", "depths"), "D"),
    "batch_size": "windows",
    "seq_len": "tokens of a window",
    "d_model": "width",
    "steps": "steps of a process",
    **dict.fromkeys(("turns", "rounds"), "turns of every side"),
    "repeats": "figures are medians over them",
    "threads": "threads of every process",
    "prompt_tokens": "tokens of a prompt",
    **dict.fromkeys(("new_tokens", "tokens"), "tokens of a text"),
    "overrides": "overrides of the config",
}


def command(
    *,
    quick: Mapping[str, Any] | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
    cpu_time: bool = False,
) -> Callable[[Function], Function]:
    """Make a function a command: ``name: type = default`` becomes ``--name``.

    A parameter without a default is required, and a positional-only one is typed without ``--``. A
    sequence takes several words, whole numbers also with commas. A flag that defaults to True is
    ``--no-name``. The ``Args`` of the docstring are the help.

    Args:
        quick: the defaults under ``--quick``; without any, the command has no such option.
        choices: parameter -> the words that it takes.
        cpu_time: whether the command has ``--cpu-time``: it does if it reads ``harness.clock``.
    """

    def mark(function: Function) -> Function:
        vars(function).update(quick=quick or {}, choices=choices or {}, cpu_time=cpu_time)
        return function

    return mark


def program(*functions: Function) -> Callable[..., Row]:
    """The ``main`` of a benchmark, ``python -m benchmarks.MODULE [COMMAND] ...``.

    Args:
        functions: the commands of a module; the first one also runs where no command is typed.

    Returns:
        A function of the words typed (default ``sys.argv``). It returns what it wrote as JSON: the
        command's result, its options, and the machine.
    """
    commands = {function.__name__: function for function in functions}
    default = functions[0].__name__

    def main(arguments: Sequence[str] | None = None) -> Row:
        given = list(sys.argv[1:] if arguments is None else arguments)
        parser = argparse.ArgumentParser(
            prog=f"python -m {harness.module_of(functions[0])}",
            description=sys.modules[functions[0].__module__].__doc__,
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
        with readable_errors():
            return _run(commands[options.pop("command")], options)

    return main


def _run(function: Function, options: Row) -> Row:
    output: Path = options.pop("output")
    if options.pop("cpu_time", False):
        harness.use_cpu_time()
    quick = vars(function)["quick"] if options.pop("quick", False) else {}
    signature = inspect.signature(function)
    settled: Row = {}
    for name, parameter in signature.parameters.items():
        value = options[name]
        if isinstance(value, list) and value and isinstance(value[0], list):
            value = [one for part in value for one in part]  # "1,2 3"
        settled[name] = quick.get(name, parameter.default) if value is None else value
    bound = inspect.BoundArguments(signature, OrderedDict(settled))
    found = function(*bound.args, **bound.kwargs)
    found = {"benchmark": function.__name__, "options": settled, **found, "machine": machine()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
    print(f"wrote {output}")
    return dict(json.loads(output.read_text(encoding="utf-8")))


def _add_options(parser: argparse.ArgumentParser, function: Function) -> None:
    marks = vars(function)
    file = Path(f"benchmarks/results/{function.__name__}.json")
    parser.add_argument("--output", type=Path, default=file, help=f"JSON file; default {file}")
    if marks["quick"]:
        parser.add_argument("--quick", action="store_true", help="a first look, not a result")
    if marks["cpu_time"]:
        text = "count CPU seconds of one thread: for a machine that does other work, too"
        parser.add_argument("--cpu-time", action="store_true", help=text)
    _, _, args = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    described = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", args, re.MULTILINE)
    helps = _HELPS | {name: " ".join(text.split()) for name, text in described}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind, default = parameter.annotation, parameter.default
        typed_alone = parameter.kind is parameter.POSITIONAL_ONLY
        flag = name if typed_alone else f"--{name.replace('_', '-')}"
        words, quick = marks["choices"].get(name), marks["quick"].get(name)
        options: Row = {"help": _help(helps.get(name, ""), default, quick, words)}
        if kind is bool:
            if default:
                flag = f"--no-{name.replace('_', '-')}"
            options |= {"action": f"store_{str(not default).lower()}", "default": None}
            parser.add_argument(flag, dest=name, **options)
            continue
        (item,) = typing.get_args(kind) or (kind,)
        options["type"] = whole_numbers if item is int and item is not kind else item
        if words:
            options |= {"choices": list(words), "metavar": name.upper()}
        if item is not kind:
            options["nargs"] = "*"
        elif typed_alone and default is not parameter.empty:
            options["nargs"] = "?"
        if not typed_alone:
            options["required"] = default is parameter.empty
        parser.add_argument(flag, **options)


def _help(text: str, default: Any, quick: Any, words: Sequence[str] | None) -> str:
    parts = [text.rstrip(".")] if text else []
    if words:
        parts.append(f"of {', '.join(map(repr, words))}")
    shown = str(default)
    if isinstance(default, tuple):
        shown = "all" if default == tuple(words or ()) else " ".join(map(str, default))
    if default not in (inspect.Parameter.empty, None, True, False, (), ""):
        parts.append(f"default {shown}" + ("" if quick is None else f", with --quick {quick}"))
    return "; ".join(parts).replace("%", "%%")


def whole_numbers(text: str) -> list[int]:
    """``"0,1,2"`` -> [0, 1, 2], for argparse."""
    return [int(part) for part in text.split(",")]


def machine() -> Row:
    """The day, the machine, its load and the versions, which belong next to a number."""
    import numpy
    import torch

    from mtp_lightning.system import processor

    return {
        "date": datetime.now(UTC).date().isoformat(),
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
    """Print a table.

    Args:
        title: the line above it.
        columns: ``"heading: key format; heading: key"``; text is aligned to the left.
        rows: the numbers by key; a row without a key has an empty cell.
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
    # A file or a pipe has no width of its own.
    console = Console()
    Console(width=console.width if console.is_terminal else 160).print(table)

"""Options, plan and phases that the commands share which train heads for a finished model. Phases
run as programs of their own, so that memory is given back between them.

A phase that has left its result in the folder is not repeated.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mtp_lightning.command_line.shell import Parser, Stopped
from mtp_lightning.errors import UserError
from mtp_lightning.parts import is_gguf
from mtp_lightning.run.layout import SUMMARY_FILE
from mtp_lightning.stored import read_json
from mtp_lightning.system import STARTER

PLAN, RUN, EXPORT = "plan.json", "run", "model"
# Settings of training that follow from the command's own options.
_OWN = {"init_from": "its models", "run_dir": "--output", "data": "--text", "data.paths": "--text"}


def add_options(parser: Parser, *, output: str, hours: str) -> None:
    """The options of the two commands that train heads for a finished model; ``output`` and
    ``hours`` are words of their help."""
    parser.add_argument("overrides", nargs="*", default=[], help="settings, as for train.py")
    parser.add_argument("--output", type=Path, help=f"folder of all results ({output})")
    parser.add_argument("--hours", type=float, default=1.0, help=hours)
    parser.add_argument(
        "--text", nargs="+", default=[], help="train on these files, not on the model's own texts"
    )


def require_inputs(args: Any, *models: Path) -> None:
    """Refuse words that are not settings of training, and paths that do not exist.

    Raises:
        UserError: naming the word, the key or the path.
    """
    from mtp_lightning.experiment.compose import compose_config
    from mtp_lightning.run.config import key_of

    for word in args.overrides:
        if "=" not in word:
            raise UserError(f"{word} is not a setting: give KEY=VALUE, as train.py takes it.")
        if word == "mtp=none":
            raise UserError("mtp=none has no head to train: give another kind, or leave it out.")
        if (key := key_of(word)) in _OWN:
            raise UserError(f"this command sets {key} by {_OWN[key]}: leave {word} out.")
    for file in (*models, *map(Path, args.text)):
        if not file.exists():
            remedy = "give settings before --text" if "=" in file.name else "check the path"
            raise UserError(f"{file} does not exist (looked from {Path.cwd()}): {remedy}.")
        if file.is_file() and not file.stat().st_size:
            raise UserError(f"{file} is empty: give a file with content.")
    data = "data=text" if args.text else "data=self_generated"
    compose_config("config", ["experiment=posthoc_heads", data, *args.overrides])


def output_of(args: Any, ending: str, *models: Path) -> Path:
    """The folder that is asked for, or the one that is named after the first model.

    Raises:
        UserError: it lies inside the folder of a model, whose files must not change.
    """
    path = models[0].resolve()
    name = path.stem if is_gguf(path) else path.name
    output: Path = (args.output or Path(f"{name}_{ending}")).resolve()
    for model in models:
        if model.is_dir() and output.is_relative_to(model.resolve()):
            raise UserError(f"--output={output} lies inside {model}: give a folder outside of it.")
    return output


def make_plan(
    model: Path,
    folder: Path,
    args: Any,
    sources: Sequence[Path],
    *,
    keep: bool,
    further: bool = False,
) -> Any:
    """Return the folder's plan, or a new one for the command's options ``args``, and print it.
    Other options replace a plan as long as no training has begun.

    Args:
        model, sources: the model that gets heads, and the files and folders that it is made of.
        keep: whether a new plan is stored.
        further: train the model's own modules further.

    Raises:
        UserError: the folder was begun with other options, or its plan is damaged.
    """
    from data_modules.cache import cache_key
    from mtp_lightning.heads.planning import HeadsPlan, plan
    from mtp_lightning.run.atomic import write_json

    file = folder / PLAN
    texts = [str(Path(text).resolve()) for text in args.text]
    options = {"hours": args.hours, "files": texts, "overrides": args.overrides}
    states = [cache_key(source, "") for source in sources]
    wanted = {"model": str(model.resolve()), **options, "sources": states}
    heads_plan = None
    if file.is_file():
        try:
            heads_plan = HeadsPlan(**read_json(file))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}): give another --output.") from error
    changed = [name for name in wanted if heads_plan and getattr(heads_plan, name) != wanted[name]]
    if heads_plan is None or (changed and not (folder / RUN).exists()):
        heads_plan = replace(plan(model, further=further, **options), sources=states)
        if keep:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(asdict(heads_plan), file)
    elif changed == ["sources"]:
        raise UserError(
            f"{folder} was begun with other files than {' and '.join(map(str, sources))} has "
            "now: give another --output."
        )
    elif changed:
        option = "--text" if changed[0] == "files" else changed[0]
        raise UserError(
            f"{folder} was begun with {option}={getattr(heads_plan, changed[0])}, not "
            f"{wanted[changed[0]]}: repeat that command, or give another --output."
        )
    print("\n".join(heads_plan.lines()), flush=True)
    return heads_plan


def run_training(plan: Any, folder: Path) -> Path:
    """Train as planned; return the run's folder."""
    run = folder / RUN
    command = ["mtp_lightning.apps.train", *plan.train(), f"run_dir={run}"]
    run_phase("training", run / SUMMARY_FILE, command)
    return run


def run_export(checkpoint: Path, folder: Path, context: int) -> None:
    """Export and verify a run or a folder. The export states ``context`` positions, since the
    windows of training are shorter than the model's own context."""
    target = folder / EXPORT
    settings = [f"checkpoint={checkpoint}", f"output={target}", f"max_positions={context}"]
    run_phase("export", target / "config.json", ["mtp_lightning.apps.export", *settings])


def run_phase(name: str, result: Path, command: Sequence[str]) -> None:
    """Run a module, unless its result is there already.

    Raises:
        UserError: it failed; its own output says why.
        Stopped: SIGTERM came while it ran, even if it ended well: no other phase may begin.
    """
    if result.is_file():
        say(name, f"done before: {result}")
        return
    say(name, shlex.join(["python", "-m", *command]))
    began = time.monotonic()
    # Modules are found where this one was, not in the folder in which it was typed.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", STARTER: str(os.getpid())}
    with subprocess.Popen([sys.executable, "-m", *command], env=environment) as phase:
        # SIGTERM is forwarded to the phase; Ctrl-C reaches both processes.
        forwarded: list[int] = []

        def forward(number: int, _: Any) -> None:
            forwarded.append(number)
            phase.send_signal(number)

        previous_handler = signal.signal(signal.SIGTERM, forward)
        try:
            code = phase.wait()
        except KeyboardInterrupt:
            phase.wait()
            raise Stopped(f"the {name} was interrupted; the same command continues here.") from None
        finally:
            signal.signal(signal.SIGTERM, previous_handler)
    if forwarded:
        raise Stopped(f"the {name} was ended; the same command continues here.", forwarded[0])
    if code:
        if result.is_file():  # such as a certificate of broken guarantees
            result.replace(result.with_name(f"failed_{result.name}"))
        raise UserError(
            f"the {name} ended with code {code} after {time.monotonic() - began:.0f} s; once that "
            "is fixed, the same command continues here."
        )
    say(name, f"took {(time.monotonic() - began) / 60:.1f} minutes")


def say(name: str, text: str) -> None:
    """Print a line with its name in a column."""
    print(f"{name:<12}{text}", flush=True)
